"""Composer's own algorithms beside ours: gradient clipping, moving averages of weights, layer norms in low precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Evaluator
from composer.algorithms import LowPrecisionLayerNorm
from composer.algorithms.low_precision_layernorm.low_precision_layernorm import LPLayerNorm
from composer.algorithms.warnings import NoEffectWarning
from composer.core import Precision
from torch.utils.data import DataLoader

from opsin.data.batch import vlm_data_spec
from opsin.training.compat import load_plain

import jobs
import settings
import zoo
from compare import gradient_difference, loss_difference, same_bits
from ranks import RankPool
from settings import METHODS, SUBSETS

ALL = SUBSETS[-1]
SOME = [(), *[(name,) for name in METHODS], ALL]
EACH = pytest.mark.parametrize(
    "subset",
    [s if s in ((), ALL) else pytest.param(s, marks=pytest.mark.slow) for s in SOME],
    ids=settings.name_of,
)
CLIP = ("composer.algorithms:GradientClipping", {"clipping_type": "norm", "clipping_threshold": 0.1})
BY_PART = ("opsin.algorithms.clipping:GradientClippingByPart", {"clipping_threshold": 0.1})
EMA = ("composer.algorithms:EMA", {"half_life": "2ba"})


def options(subset: tuple[str, ...], *more: tuple[str, dict], steps: int = 2) -> dict[str, Any]:
    samples = [*settings.mixed(1), *settings.text_only(20), *settings.mixed(11)][: 4 * steps]
    return {
        "samples": samples, "global_batch": 4, "microbatch": 2, "steps": steps,
        "algorithms": [*settings.algorithms(subset), *more], **settings.MODEL,
    }  # fmt: skip


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


@EACH
def test_gradient_clipping(subset: tuple[str, ...]) -> None:
    """The gradient of all terms together, in its own direction, at the norm that was asked for."""
    plain, clipped = jobs.train(**options(subset)), jobs.train(**options(subset, CLIP))
    assert plain["losses"][0] == clipped["losses"][0] and norm(plain["gradients"][0]) > 1
    factor = 0.1 / norm(plain["gradients"][0])
    for name, gradient in plain["gradients"][0].items():
        assert torch.allclose(gradient * factor, clipped["gradients"][0][name], rtol=1e-4, atol=1e-8)
    assert all(norm(g) == pytest.approx(0.1, rel=1e-4) for g in clipped["gradients"])


@pytest.mark.world
@pytest.mark.parametrize("clip", [CLIP, BY_PART], ids=["whole", "by part"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_gradient_clipping_of_all_methods_on_two_ranks(parallel: str, clip: tuple, ranks: RankPool) -> None:
    """By the norm of what all ranks hold together: sharded gradients are clipped as whole ones are."""
    one, plain = (jobs.train(**options(ALL, *more, steps=1)) for more in ((clip,), ()))
    assert norm(one["gradients"][0]) < 0.5 * norm(plain["gradients"][0])
    for result in ranks.run("jobs:train", **options(ALL, clip, steps=1), parallel=parallel):
        assert result["fsdp"] == (parallel == "fsdp2")
        assert loss_difference(one, result) < 1e-5 and gradient_difference(one, result) < 1e-5


def evaluator() -> Evaluator:
    """Held-out samples, looked at after each step."""
    built = zoo.build("llava", seed=1, size=32)
    samples = jobs.Samples(settings.mixed(50), 4, 0, 1)
    loader = DataLoader(samples, 4, collate_fn=jobs.collator(built))
    return Evaluator(
        label="held-out", dataloader=vlm_data_spec(loader, training=False), device_eval_microbatch_size=4
    )


@EACH
def test_a_moving_average_is_what_is_evaluated_and_never_what_is_trained(subset: tuple[str, ...]) -> None:
    """Heads, targets and the record of a step survive that weights are swapped between steps."""
    results = []
    for more in ((), (EMA,)):
        trainer = {"eval_dataloader": evaluator(), "eval_interval": "1ba"}
        results.append(jobs.train(**options(subset, *more, steps=3), trainer=trainer))
    plain, averaged = results
    assert same_bits(plain, averaged)
    seen = [[step[key] for step in r["logged"] if (key := "metrics/held-out/nll") in step] for r in results]
    assert (
        len(seen[0]) == len(seen[1]) == 3 and seen[0][0] == seen[1][0]
    )  # averages begin after the first step
    assert all(a != b for a, b in zip(seen[0][1:], seen[1][1:], strict=True))


@EACH
def test_a_moving_average_goes_on_from_a_checkpoint(subset: tuple[str, ...], tmp_path: Path) -> None:
    whole = jobs.train(
        **options(subset, EMA, steps=3), trainer={"save_folder": str(tmp_path), "save_interval": "1ba"}
    )
    place = tmp_path / "ep0-ba1-rank0.pt"
    again = jobs.train(
        **options(subset, EMA, steps=3),
        trainer={"load_path": str(place), "save_folder": str(tmp_path / "again"), "save_interval": "1ba"},
    )
    assert same_bits({**whole, "losses": whole["losses"][1:]}, again)
    averages = dict(load_plain(str(place))["state"]["algorithms"])["EMA"]["ema_model"][
        "named_parameters_dict"
    ]
    heads = {n.split(".")[2] for n in averages if n.startswith("net.auxiliary.")}
    assert heads == {
        n for n in subset if METHODS[n].head
    }  # also of heads that were attached after EMA's own INIT


class InLowPrecision(LowPrecisionLayerNorm):
    """As under ``precision: amp_bf16``, which Composer refuses on a CPU."""

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        state._precision, kept = Precision.AMP_BF16, state._precision
        try:
            super().apply(event, state, logger)
        finally:
            state._precision = kept
        replaced = [m for m in state.model.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert replaced and all(isinstance(m, LPLayerNorm) for m in replaced)
        optimized = sorted(id(p) for group in state.optimizers[0].param_groups for p in group["params"])
        assert optimized == sorted(id(p) for p in state.model.parameters() if p.requires_grad)


@EACH
def test_layer_norms_in_low_precision_are_replaced_in_tower_and_heads(subset: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Composer's class casts by the state of CUDA's autocast, so that on a CPU its layers give fp32's numbers."""
    monkeypatch.setattr(jobs, "InLowPrecision", InLowPrecision, raising=False)
    trainable = {"vision_tower": True, "mm_projector": True, "language_model": True}
    low = ("jobs:InLowPrecision", {})
    for autocast, parts in (
        (False, None),
        (True, trainable),
    ):  # None: a frozen tower, whose norms stay frozen
        plain, replaced = (
            jobs.train(**options(subset, *more), autocast=autocast, trainable=parts) for more in ((), (low,))
        )
        assert plain["keys"] == replaced["keys"] and plain["weights"].keys() == replaced["weights"].keys()
        assert loss_difference(plain, replaced) < (2e-2 if autocast else 1e-6)


def test_layer_norms_in_low_precision_have_no_effect_on_a_cpu_and_say_so() -> None:
    with pytest.warns(NoEffectWarning):
        found = jobs.train(**options(ALL, ("composer.algorithms:LowPrecisionLayerNorm", {})), autocast=True)
    assert same_bits(jobs.train(**options(ALL), autocast=True), found)
