"""ROSS: the acceptance tests of its sheet, batches cut in every way, numbers alike on ranks, exact resumption."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from opsin.algorithms.ross import ROSS
from opsin.algorithms.ross.functional import draw_noise, reconstruction_loss
from opsin.algorithms.ross.views import Views
from opsin.models.errors import UserError
from opsin.models.export import export_model
from opsin.models.vlm import VisionLanguageModel
from opsin.training.finished import largest_difference

import jobs
import zoo
from methods import Bench, LoudROSS

SMALL: dict[str, Any] = {"target": {"name": "pixels", "cell": 4}, "width": 64}
ROSS_HERE, LOUD = "opsin.algorithms.ross:ROSS", "methods:LoudROSS"
NAMES = {"total": "loss/train/total", "lm": "loss/train/lm", "ross": "loss/train/ross"}
REGRESSION = {"objective": "cosine", "head": "mlp"}


def bench(family: str = "llava", also: tuple = (), **arguments: Any) -> Bench:
    return Bench(LoudROSS(**{**SMALL, **arguments}), family, also=also)


def samples() -> list[dict]:
    """None, one and two pictures, of sizes that give several grids where the family has them."""
    return [
        zoo.sample(
            i, images=(1, 0, 2)[i % 3], turns=1 + i % 2, size=[(20, 16), (40, 18), (16, 33)][i // 2 % 3]
        )
        for i in range(8)
    ]


def alike(a: tuple, b: tuple, tolerance: float = 1e-5) -> None:
    assert a[0] == pytest.approx(b[0], abs=tolerance) and a[0] > 0
    assert a[1].keys() == b[1].keys()
    for name, gradient in a[1].items():
        assert torch.allclose(gradient, b[1][name], atol=tolerance, rtol=1e-4), name


# Acceptance (2, 3 and 8 are in test_ross_heads.py) -------------------------------------------------------------


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_1_starts_at_one_with_no_pull_on_the_model_and_pulls_within_three_steps(family: str) -> None:
    drill = Bench(ROSS(**SMALL, draws=8), family)
    batch = drill.batch([zoo.sample(i, images=2, size=(40, 40)) for i in range(12)])
    optimizer = torch.optim.AdamW(drill.model.net.auxiliary["ross"].parameters(), lr=1e-3)
    pulled = []
    for step in range(4):
        loss, gradients = drill.step(batch)
        if step == 0:
            assert loss == pytest.approx(1.0, abs=0.02)
        pulled.append(any("net.hf" in name for name in gradients))
        optimizer.step()
    assert pulled[0] is False and pulled[3] is True


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("arguments", [{}, REGRESSION], ids=["epsilon", "cosine"])
def test_4_a_text_only_sample_leaves_the_visual_loss_alone(family: str, arguments: dict) -> None:
    drill = bench(family, **arguments)
    seen = [s for i, s in enumerate(samples()) if i % 3 != 1]
    text = [zoo.sample(90 + i, images=0, turns=2) for i in range(3)]
    alone = drill.step(drill.batch(seen))
    alike(alone, drill.step(drill.batch([text[0], *seen[:2], text[1], *seen[2:], text[2]])))
    alike(alone, drill.step(drill.batch([*text, *seen]), 1))
    none = drill.step(drill.batch(text))
    assert none == (0.0, {})


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_5_padding_packing_order_and_micro_batches_change_nothing(family: str) -> None:
    drill, found = bench(family), samples()
    reference = drill.step(drill.batch(found))
    for size in (8, 4, 2, 1):
        alike(reference, drill.step(drill.batch(found), size))
    alike(reference, drill.step(drill.batch(found, padding_side="left")))
    alike(reference, drill.step(drill.batch(found, padding_side="left"), 2))
    alike(reference, drill.step(drill.batch(found, packing=True)))
    alike(reference, drill.step(drill.batch(found, packing=True), 1))
    alike(reference, drill.step(drill.batch(random.Random(1).sample(found, len(found)), packing=True), 2))
    alike(reference, drill.step(drill.batch(found, pad_to_multiple_of=64)))


@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("head", ["dit", "vit"])
def test_5_several_images_are_the_sum_of_their_own_views(family: str, head: str) -> None:
    drill = bench(family, head=head)
    method: Any = drill.method
    (part,) = drill.parts(drill.batch([zoo.sample(1, images=3, size=(40, 18)), zoo.sample(2, images=2)]))
    hidden = torch.randn(*part["input_ids"].shape, 32, requires_grad=True)
    views, _ = method.views(drill.model, part)
    key = method.keys(part)
    network = drill.model.net.auxiliary["ross"]
    target = method.targets(drill.model, part, views, key)
    total, start = torch.zeros(()), 0
    for i, grid in enumerate(part["grids"]):
        own, one = slice(start, start + grid[0] * grid[1]), Views.of([grid])
        draws = draw_noise(key[i : i + 1], one, 4, target.shape[1], 1000)
        condition = hidden.flatten(0, 1)[part["patch_position"][own]]
        loss = reconstruction_loss(
            network, condition, target[own], one, method.objective, draws, method._shares
        )
        total, start = total + loss.mean(), own.stop
    together = method.local_loss(drill.model, part, hidden)
    assert len(key.unique()) == len(part["grids"]) == len(part["view_image"])
    assert float(together) == pytest.approx(float(total), rel=1e-5)
    a, b = (torch.autograd.grad(x, hidden)[0] for x in (together, total))
    assert torch.allclose(a, b, atol=1e-5)


def test_6_weight_zero_gives_the_gradients_of_the_plain_run_bit_for_bit() -> None:
    plain = jobs.train(steps=3)
    off = jobs.train(steps=3, algorithms=[(ROSS_HERE, {**SMALL, "weight": 0.0})])
    assert plain["losses"] == off["losses"] and plain["weights"].keys() == off["weights"].keys()
    running = jobs.train(steps=3, algorithms=[(LOUD, {**SMALL, "weight": 0.0})])
    assert running["keys"][0] == list(NAMES.values())
    for other in (off, running):
        for before, after in zip(plain["gradients"], other["gradients"], strict=True):
            assert all(torch.equal(before[k], after[k]) for k in before)
        assert all(torch.equal(v, other["weights"][k]) for k, v in plain["weights"].items())


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_7_an_export_is_the_unmodified_model(family: str, tmp_path: Path) -> None:
    drill = bench(family)
    batch = drill.batch([zoo.sample(i) for i in range(4)])
    optimizer = torch.optim.AdamW(drill.model.parameters(), lr=1e-2)
    before = drill.model.eval().logits(batch)
    drill.model.train()
    for _ in range(2):
        drill.step(batch)
        optimizer.step()
    folder = export_model(drill.model.eval(), tmp_path / "out")
    plain, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert largest_difference(drill.model, plain, drill.collator, [zoo.sample(i, images=1 + i % 2) for i in range(3)]) < 1e-4  # fmt: skip
    assert not torch.allclose(before, drill.model.logits(batch), atol=1e-3)
    assert not any("ross" in str(p) or "heads" in str(p) for p in folder.iterdir())


# Beside clipping, in low precision, resumed, on ranks ------------------------------------------------------------


def test_a_detached_head_leaves_the_runs_numbers_alone_where_clipping_is_by_part() -> None:
    ours = ("opsin.algorithms.clipping:GradientClippingByPart", {"clipping_threshold": 0.3})
    stock = ("composer.algorithms:GradientClipping", {"clipping_type": "norm", "clipping_threshold": 0.3})
    aside = (LOUD, {**SMALL, "detach": True})
    told = {}
    for name, algorithms in {"free": [], "ours": [ours], "ours+": [ours, aside], "aside": [aside], "stock": [stock], "stock+": [stock, aside]}.items():  # fmt: skip
        result = jobs.train(steps=5, algorithms=algorithms, trainable={"language_model": True, "mm_projector": True, "vision_tower": False}, lr=1e-2)  # fmt: skip
        told[name] = [loss[NAMES["lm"]] for loss in result["losses"]]
    assert told["ours"] == told["ours+"] and told["free"] == told["aside"]
    assert (
        told["ours"] == told["stock"] != told["free"]
    )  # it does clip, and as Composer's where there is no head
    assert told["stock+"] != told["stock"]  # Composer's one norm lets the head shrink the model's step


@pytest.mark.parametrize("arguments", [{}, {"head": "vit"}, REGRESSION, {"objective": "decoded_mse"}])
def test_bf16_is_close_to_fp32(arguments: dict) -> None:
    drill = bench(**arguments)
    batch = drill.batch(samples())
    loss, gradients = drill.step(batch)
    drill.model.net.autocast_dtype = torch.bfloat16
    low, others = drill.step(batch)
    assert low == pytest.approx(loss, rel=0.03) and low != loss
    a, b = (torch.cat([g[n].flatten() for n in gradients if "ross" in n]) for g in (gradients, others))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.99
    assert b.dtype == torch.float32


def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    spec = [(LOUD, SMALL)]
    saving = {"save_folder": str(tmp_path), "save_filename": "ba{batch}.pt", "save_interval": "2ba"}
    whole = jobs.train(steps=4, algorithms=spec, trainer=saving)
    rest = jobs.train(steps=4, samples=jobs.mixed_samples(32), algorithms=spec, trainer={"load_path": str(tmp_path / "ba2.pt")})  # fmt: skip
    assert rest["losses"] == whole["losses"][2:]
    assert all(torch.equal(v, rest["weights"][k]) for k, v in whole["weights"].items())


@pytest.mark.world
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("family", "arguments"),
    [("llava", {}), ("llava_next", {}), ("qwen2_5_vl", {}), ("llava_next", REGRESSION), ("llava", {"objective": "decoded_mse"})],
)  # fmt: skip
def test_two_ranks_give_the_numbers_of_one_with_pictures_on_one_rank_only(
    ranks, family: str, arguments: dict, parallel: str
) -> None:
    clip = ("opsin.algorithms.clipping:GradientClippingByPart", {"clipping_threshold": 0.5})
    spec = [(LOUD, {**SMALL, **arguments}), clip]
    options = {
        "samples": jobs.mixed_samples(12, "first_half"),
        "global_batch": 4,
        "steps": 2,
        "microbatch": 1,
    }
    options["lr"] = 1e-3
    one = jobs.train(family, algorithms=spec, **options)
    two = ranks.run("jobs:train", family=family, algorithms=spec, parallel=parallel, **options)
    assert two[0]["keys"] == two[1]["keys"] == one["keys"] and two[0]["fsdp"] == (parallel == "fsdp2")
    if parallel == "fsdp2":
        assert two[0]["plain_parameters"] == []
    for step, (a, b) in enumerate(zip(one["losses"], two[0]["losses"], strict=True)):
        for key, value in a.items():
            assert value == pytest.approx(b[key], abs=1e-4), (step, key)
    for name, gradient in one["gradients"][0].items():
        assert torch.allclose(gradient, two[0]["gradients"][0][name], atol=1e-5), name


# Arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"weight": -0.5}, "weight: -0.5: use 0"), ({"weight": float("nan")}, "weight: nan: use 0"),
     ({"lr": 0.0}, "lr: 0.0: use a rate above 0"), ({"lr": -1.0}, "lr: -1.0: use a rate above 0"),
     ({"objective": "decoded_mse", "stored": "required"}, "stored: decoded_mse compares pictures"), ({"draws": 0}, "draws: 0 is less than 1"),
     ({"timesteps": 0}, "timesteps: 0 is less than 1"), ({"min_visible": 0}, "min_visible: 0 is less than 1"),
     ({"letterbox": "msk"}, "letterbox 'msk': unknown; did you mean 'mask'"),
     ({"stored": "requird"}, "stored 'requird': unknown; did you mean 'required'"),
     ({"objective": "epsilom"}, "objective: unknown objective 'epsilom'; did you mean 'epsilon'"),
     ({"head": "lineer"}, "head 'lineer': unknown; did you mean 'linear'"),
     ({"head": "mlp"}, "head: objective 'epsilon' needs dit or vit, not 'mlp'"),
     ({"head": "vit", "objective": "cosine"}, "head: objective 'cosine' needs linear or mlp, not 'vit'"),
     ({"layer": 0}, "layer: 0: use -1 (after the final norm) or 1 .. N"), ({"layer": -2}, "layer: -2: use -1"),
     ({"depth": 0}, "depth: 0 is less than 1"),
     ({"target": "pixel"}, "target: unknown target 'pixel'; did you mean 'pixels'"),
     ({"target": {"name": "vea"}}, "target.name: unknown target 'vea'; did you mean 'vae'"),
     ({"target": {"cell": 4}}, "target.name: unknown target 'None'"),
     ({"target": ["pixels"]}, "target: ['pixels']: use a name or a mapping with a name"),
     ({"target": {"name": "pixels", "cels": 4}}, "target.cels: unknown key; did you mean 'cell'"),
     ({"target": {"name": "pixels", "cell": 0}}, "target.cell: a whole number of at least 1, got 0"),
     ({"target": {"name": "pixels", "cell": "x"}}, "target.cell: a whole number of at least 1, got 'x'"),
     ({"target": {"name": "autoencoder", "weights": 5}}, "target: TypeError"),
     ({"target": {"name": "vae", "config": 5}}, "target"),
     ({"mlp_ratio": 0.001}, "mlp_ratio: 0.001 leaves no channel")],
)  # fmt: skip
def test_wrong_arguments_are_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        Bench(ROSS(**{**SMALL, **arguments}))
    assert str(error.value).startswith(f"algorithms.ross.{message}") and "\n" not in str(error.value)


def test_what_only_the_model_or_the_data_can_tell_is_one_line_too() -> None:
    with pytest.raises(UserError, match="stored: the dataset brings no targets; make them with `opsin data"):
        bench(stored="required")
    with pytest.raises(UserError, match=r"algorithms.ross.layer: 9: the language model has layers 1 to 4"):
        jobs.train(steps=1, algorithms=[(ROSS_HERE, {**SMALL, "layer": 9})])
    with pytest.raises(UserError, match=r"algorithms.ross.width: 200 must be a multiple"):
        bench(width=200)


def test_a_layer_within_is_read_too_and_the_head_is_of_the_size_asked_for() -> None:
    deep, last = bench(layer=2), bench(width="scaled", depth=1)
    batch = deep.batch(samples())
    names = deep.step(batch)[1]
    assert not any("layers.2." in n or "language_model.norm" in n for n in names)
    assert any("layers.1." in n for n in names)
    assert any("language_model.norm" in n for n in last.step(batch)[1])
    head: Any = last.model.net.auxiliary["ross"]
    assert head.width == 64 and len(head.blocks) == 1 and isinstance(last.model, VisionLanguageModel)


def test_the_head_has_a_learning_rate_of_its_own() -> None:
    """The model's rate is 0 and nothing of it moves; the head's is not, and its zero-initialised output does."""
    arguments = {**SMALL, "lr": 1e-2}
    after = jobs.train(steps=2, lr=0.0, algorithms=[(ROSS_HERE, arguments)])["weights"]
    plain = jobs.train(steps=1, lr=0.0)["weights"]
    assert all(torch.equal(after[name], plain[name]) for name in plain)
    assert after["net.auxiliary.ross.output.weight"].abs().max() > 0
