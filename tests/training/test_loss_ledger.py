"""The loss ledger: what each term is made of, whoever's method it is, however the batch is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.models.errors import UserError
from opsin.training.check import refuse_mistakes
from opsin.training.loss_ledger import LossLedger
from opsin.training.metrics_file import read_metrics
from opsin.training.train import train

import jobs
import runs
from methods import teacher

WEIGHTS = {"lm": 1.0, "mean_colour": 0.5, "ross": 0.7, "jarvis": 2.0}
METHODS: list[tuple[str, dict]] = [
    ("methods:MeanColour", {"weight": WEIGHTS["mean_colour"]}),
    ("methods:LoudROSS", {"target": {"name": "pixels", "cell": 4}, "width": 64, "weight": WEIGHTS["ross"]}),
    ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3}),
    ("opsin.algorithms.jarvis:JARVIS", {"target": teacher(), "masks": "none", "ntp_probability": 0.3, "weight": WEIGHTS["jarvis"]}),
]  # fmt: skip
LEDGER = "opsin.training.loss_ledger:LossLedger"
ASKED = (LEDGER, {"gradient_share_interval": 2})
PARTS = ("mm_projector", "language_model")


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return jobs.train(steps=2, algorithms=METHODS)


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    return jobs.train(steps=2, algorithms=METHODS, callbacks=[ASKED])


def entries(result: dict[str, Any], step: int) -> dict[str, float]:
    found = result["logged"][step]
    return {k.removeprefix("ledger/"): v for k, v in found.items() if k.startswith("ledger/")}


def test_every_term_has_its_raw_value_weight_and_count(asked: dict[str, Any]) -> None:
    for step, losses in enumerate(asked["losses"]):
        found = entries(asked, step)
        for name, weight in WEIGHTS.items():
            assert found[f"{name}/weight"] == pytest.approx(weight, rel=1e-6)
            assert weight * found[f"{name}/raw"] == pytest.approx(losses[f"loss/train/{name}"], rel=1e-5)
            assert found[f"{name}/count"] > 0
    # Per 4 samples 1, 0, 2 and 1 pictures of 16 patches; a third party's method says nothing of its unit.
    assert [entries(asked, s)["ross/count"] for s in (0, 1)] == [8, 8]
    assert [entries(asked, s)["mean_colour/count"] for s in (0, 1)] == [8 * 16, 8 * 16]
    assert entries(asked, 0)["jarvis/count"] in range(16, 8 * 16, 16)


def test_asking_changes_no_bit_of_the_training(plain: dict[str, Any], asked: dict[str, Any]) -> None:
    assert plain["losses"] == asked["losses"]
    assert plain["weights"].keys() == asked["weights"].keys()
    assert all(torch.equal(plain["weights"][k], asked["weights"][k]) for k in plain["weights"])
    assert not any("gradient" in k for k in entries(asked, 0))  # not asked in step 1


def norms_of(result: dict[str, Any], step: int) -> dict[str, float]:
    """Norm of the step's own gradient, over the base model and by part."""
    parts: dict[str, list[torch.Tensor]] = {"mm_projector": [], "language_model": []}
    for name, gradient in result["gradients"][step].items():
        if name.startswith("net.hf."):
            parts["mm_projector" if "projector" in name else "language_model"].append(gradient.flatten())
    by_part = {part: float(torch.cat(g).double().norm()) for part, g in parts.items()}
    return {**by_part, "": float(sum(n * n for n in by_part.values()) ** 0.5)}


def test_shares_are_of_the_sum_of_gradients(plain: dict[str, Any], asked: dict[str, Any]) -> None:
    """Each key's gradient is that of a run in which all else weighs nothing, and together they are the step's."""
    found = entries(asked, 1)
    for part in ("", *(f"/{p}" for p in PARTS)):
        for kind in ("share", "along"):
            assert sum(found[f"{k}/gradient_{kind}{part}"] for k in WEIGHTS) == pytest.approx(1, abs=1e-6)
    # <g_t, g> summed over the terms is |g|^2: recover |g| from one term's projection and the others'.
    alone = jobs.train(steps=1, callbacks=[(LEDGER, {"gradient_share_interval": 1})])
    one, norms = entries(alone, 0), norms_of(alone, 0)
    for part in ("", *PARTS):
        key = f"lm/gradient_norm{'/' + part if part else ''}"
        assert one[key] == pytest.approx(norms[part], rel=1e-5)
    assert one["lm/gradient_share"] == one["lm/gradient_along"] == 1


@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize(
    "microbatch", [4, 3, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 7, 6, 5, 2))]
)
def test_micro_batches_and_composers_shares_touch_no_term(
    asked: dict[str, Any], microbatch: int, tokens: bool
) -> None:
    """Composer scales a micro-batch's whole loss by its share of samples or tokens; views and patches must not feel it."""
    cut = jobs.train(
        steps=2, algorithms=METHODS, callbacks=[ASKED], microbatch=microbatch, accumulate_on_tokens=tokens
    )
    for key, value in asked["losses"][0].items():
        assert cut["losses"][0][key] == pytest.approx(value, abs=1e-5), key
    for name, gradient in asked["gradients"][0].items():
        assert torch.allclose(gradient, cut["gradients"][0][name], atol=1e-5), name
    assert entries(cut, 0) == pytest.approx(entries(asked, 0), abs=1e-5)
    # The second step's weights differ by rounding, which Adam's first step makes larger.
    assert entries(cut, 1) == pytest.approx(entries(asked, 1), abs=2e-3, rel=2e-3)


@pytest.mark.slow
def test_compiled_and_checkpointed_layers_are_differentiated_as_often_as_asked(asked: dict[str, Any]) -> None:
    """A compiled layer gives away what its backward pass needs, and refuses another one, unless told otherwise."""
    for prepared in ({"compiled": {"backend": "aot_eager"}}, {"checkpointing": True}):
        found = jobs.train(steps=2, algorithms=METHODS, callbacks=[ASKED], prepared=prepared)
        assert entries(found, 0) == pytest.approx(entries(asked, 0), abs=1e-4)
        assert entries(found, 1) == pytest.approx(entries(asked, 1), abs=2e-3, rel=2e-3)


@pytest.mark.world
def test_two_ranks_log_the_numbers_of_one(ranks: Any) -> None:
    options: dict[str, Any] = {
        "algorithms": METHODS, "samples": jobs.mixed_samples(8, "first_half"), "global_batch": 4, "microbatch": 1,
        "steps": 1, "callbacks": [(LEDGER, {"gradient_share_interval": 1})],
    }  # fmt: skip
    one = jobs.train(**options)
    two = ranks.run("jobs:train", **options)
    assert entries(two[0], 0) == pytest.approx(entries(one, 0), abs=1e-5)
    assert entries(two[0], 0) == entries(two[1], 0)
    sharded = ranks.run("jobs:train", **{**options, "callbacks": [(LEDGER, {})]}, parallel="fsdp2")
    assert sharded[0]["fsdp"]
    told = {k: v for k, v in entries(one, 0).items() if "gradient" not in k}
    assert entries(sharded[0], 0) == pytest.approx(told, abs=1e-5)
    refused = ranks.run("poison:ended", **options, parallel="fsdp2")
    assert all(
        "loss_ledger: not with parallelism_config.fsdp2 (gradient_share_" in r["said"] for r in refused
    )


def test_intervals_below_one_are_refused() -> None:
    with pytest.raises(UserError, match="gradient_share_interval: 0 is less than 1"):
        LossLedger(gradient_share_interval=0)


def test_gradient_shares_under_fsdp2_are_refused_before_anything_is_built(
    tmp_path: Path, scenes: str
) -> None:
    def refuse(**keywords: Any) -> None:
        loaded = runs.loaded(
            tmp_path, scenes, parallelism_config={"fsdp2": {}}, callbacks={"loss_ledger": keywords}
        )
        refuse_mistakes(loaded, here=False)

    refuse()
    with pytest.raises(
        UserError, match=r"run\.yaml:\d+: callbacks\.loss_ledger: does not work with .*fsdp2: true"
    ):
        refuse(gradient_share_interval=2)


def test_a_run_writes_its_ledger_into_metrics(tmp_path: Path, scenes: str) -> None:
    ross = {"ross": {"target": {"name": "pixels", "cell": 4}, "width": 64, "weight": 0.5, "draws": 1}}
    folder = train(
        runs.loaded(
            tmp_path, scenes, algorithms=ross, max_duration="2ba",
            callbacks={"loss_ledger": {"gradient_share_interval": 2}},
        )
    )  # fmt: skip
    first, second = read_metrics(folder.metrics)
    assert first["ledger/ross/weight"] == 0.5 and first["ledger/ross/count"] == 8
    assert 0.5 * first["ledger/ross/raw"] == pytest.approx(first["loss/train/ross"], rel=1e-6)
    shares = [second[f"ledger/{k}/gradient_share/vision_tower"] for k in ("lm", "ross")]
    assert sum(shares) == pytest.approx(1) and "ledger/ross/gradient_share" not in first
    bare = train(runs.loaded(tmp_path, scenes, algorithms=ross, max_duration="1ba", run_name="bare"))
    # Every run has one; asking it for more is another callback setting, and changes nothing.
    assert read_metrics(bare.metrics)[0]["ledger/lm/raw"] == first["ledger/lm/raw"]
    # So a run that was begun may be asked when it goes on.
    again = {"run_name": "bare", "callbacks": {"loss_ledger": {"gradient_share_interval": 1}}}
    train(runs.loaded(tmp_path, scenes, algorithms=ross, max_duration="1ba", **again))
