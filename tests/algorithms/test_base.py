"""What every method owes, held on a method with a head, a tap and a loss of its own."""

from __future__ import annotations

import pytest
import torch

import jobs

HEAD = ("methods:MeanColour", {"weight": 0.5})
ROSS = ("methods:LoudROSS", {"target": {"name": "pixels", "cell": 4}, "width": 64})
L2T = ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3})


def test_the_loss_dict_has_one_key_a_method_and_its_parameters_train() -> None:
    result = jobs.train(steps=3, algorithms=[HEAD])
    assert result["keys"][0] == ["loss/train/total", "loss/train/lm", "loss/train/mean_colour"]
    total, lm, own = (result["losses"][0][k] for k in result["keys"][0])
    assert total == pytest.approx(lm + own, abs=1e-6)
    gradient = result["gradients"][0]["net.auxiliary.mean_colour.line.weight"]
    assert gradient.abs().max() > 0
    start = jobs.train(steps=1, algorithms=[HEAD], lr=0.0)["weights"]["net.auxiliary.mean_colour.line.weight"]
    assert not torch.equal(start, result["weights"]["net.auxiliary.mean_colour.line.weight"])


def test_a_heads_initialisation_leaves_the_base_model_untouched_and_depends_on_the_seed_alone() -> None:
    plain = jobs.train(steps=1, lr=0.0)
    one = jobs.train(steps=1, lr=0.0, algorithms=[HEAD])
    both = jobs.train(steps=1, lr=0.0, algorithms=[L2T, HEAD])
    other = jobs.train(steps=1, lr=0.0, algorithms=[HEAD], seed=4)
    name = "net.auxiliary.mean_colour.line.weight"
    assert plain["losses"][0]["loss/train/lm"] == one["losses"][0]["loss/train/lm"]
    assert all(torch.equal(plain["weights"][k], one["weights"][k]) for k in plain["weights"])
    assert torch.equal(one["weights"][name], both["weights"][name])
    assert not torch.equal(one["weights"][name], other["weights"][name])


def test_off_means_off_bit_for_bit_and_attaches_nothing() -> None:
    plain = jobs.train(steps=3)
    off = jobs.train(steps=3, algorithms=[("methods:MeanColour", {"weight": 0.0})])
    assert plain["losses"] == off["losses"]
    assert plain["weights"].keys() == off["weights"].keys()
    assert all(torch.equal(plain["weights"][k], off["weights"][k]) for k in plain["weights"])


@pytest.mark.parametrize("layer", [-1, 2])
@pytest.mark.parametrize("method", [HEAD, ROSS], ids=["mean_colour", "ross"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_micro_batches_do_not_change_a_methods_loss(
    family: str, method: tuple[str, dict], layer: int
) -> None:
    spec = [(method[0], {**method[1], "layer": layer})]
    whole = jobs.train(family, steps=1, algorithms=spec)
    parts = jobs.train(family, steps=1, algorithms=spec, microbatch=1, accumulate_on_tokens=True)
    for key in whole["keys"][0]:
        assert whole["losses"][0][key] == pytest.approx(parts["losses"][0][key], abs=1e-5)
    for name, gradient in whole["gradients"][0].items():
        assert torch.allclose(gradient, parts["gradients"][0][name], atol=1e-5), name


def test_the_order_of_methods_does_not_change_the_numbers() -> None:
    orders = ([HEAD, L2T, ROSS], [ROSS, L2T, HEAD])
    a, b = (jobs.train(steps=2, algorithms=order) for order in orders)
    for x, y in zip(a["losses"], b["losses"], strict=True):
        assert x == pytest.approx(y, abs=1e-6)  # the total is summed in the order of methods
    assert (
        a["losses"][0].items() - {("loss/train/total", a["losses"][0]["loss/train/total"])}
        <= b["losses"][0].items()
    )


def test_a_method_survives_batches_without_pictures() -> None:
    result = jobs.train(steps=2, samples=jobs.mixed_samples(16, "none"), algorithms=[HEAD, ROSS])
    for name in ("mean_colour", "ross"):
        assert result["losses"][1][f"loss/train/{name}"] == 0.0
        found = [g for n, g in result["gradients"][0].items() if n.startswith(f"net.auxiliary.{name}.")]
        assert found and not any(g.any() for g in found)


@pytest.mark.world
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_give_the_numbers_of_one_with_pictures_on_one_rank_only(
    ranks, family: str, parallel: str
) -> None:
    options = {
        "samples": jobs.mixed_samples(12, "first_half"),
        "global_batch": 4,
        "steps": 3,
        "microbatch": 1,
    }
    one = jobs.train(family, algorithms=[HEAD, L2T], **options)
    two = ranks.run("jobs:train", family=family, algorithms=[HEAD, L2T], parallel=parallel, **options)
    assert two[0]["keys"] == two[1]["keys"] == one["keys"]
    assert two[0]["fsdp"] == (parallel == "fsdp2")
    if parallel == "fsdp2":
        assert two[0]["plain_parameters"] == []
    for step, (a, b) in enumerate(zip(one["losses"], two[0]["losses"], strict=True)):
        for key, value in a.items():
            assert value == pytest.approx(b[key], abs=1e-4), (step, key)
    for name, gradient in one["gradients"][0].items():
        assert torch.allclose(gradient, two[0]["gradients"][0][name], atol=1e-5), name
