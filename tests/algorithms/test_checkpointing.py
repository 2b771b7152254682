"""Activation checkpointing with every method: the same numbers, taps of the first pass, dropout drawn once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.models.checkpointing import checkpoint_layers

import jobs
import methods
import zoo
from methods import Bench

ROSS = ("methods:LoudROSS", {"target": {"name": "pixels", "cell": 4}, "width": 64, "layer": 2})
JARVIS: dict[str, Any] = {"target": methods.teacher(), "ntp_probability": 0.0, "layer": 2}
MASKED = ("opsin.algorithms.jarvis:JARVIS", {**JARVIS, "text_loss": "masked"})
BRANCH = ("opsin.algorithms.jarvis:JARVIS", {**JARVIS, "text_loss": "unmasked", "see_pretext": True})
L2T = ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3})
WEIGHED = (L2T[0], {**L2T[1], "token_weights": "visual_relevance"})
VIFT = ("opsin.algorithms.vift:ViFT", {"max_refused": None})
HIDING: dict[str, Any] = {"size": 32, "bidirectional": True}


def alike(plain: dict[str, Any], saved: dict[str, Any], tolerance: float = 0.0) -> None:
    for a, b in zip(plain["losses"], saved["losses"], strict=True):
        assert a == pytest.approx(b, abs=tolerance)
    for a, b in zip(plain["gradients"], saved["gradients"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.allclose(a[name], b[name], atol=max(tolerance, 1e-7), rtol=1e-5), name


SLOW = pytest.mark.slow  # what the last case holds, too


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param([], id="none"),
        pytest.param([MASKED], id="jarvis-masked"),
        pytest.param([WEIGHED], id="l2t"),
        pytest.param([ROSS], id="ross", marks=SLOW),
        pytest.param([BRANCH], id="jarvis-branch", marks=SLOW),
        pytest.param([VIFT], id="vift", marks=SLOW),
        pytest.param([ROSS, BRANCH, L2T, VIFT], id="all"),
    ],
)
def test_checkpointing_changes_no_number_with_dropout_on(spec: list) -> None:
    """Dropout of attention, 30 %: what is drawn in the first pass is drawn again when a layer runs once more."""
    options: dict[str, Any] = {"algorithms": spec, "steps": 2, "microbatch": 4, "lr": 1e-3, **HIDING}
    plain = jobs.train(prepared={"dropout": 0.3}, **options)
    alike(plain, jobs.train(prepared={"dropout": 0.3, "checkpointing": True}, **options))
    if not spec:
        assert plain["losses"] != jobs.train(**options)["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.EVERY_FAMILY)
def test_checkpointing_changes_no_number_in_any_family(family: str) -> None:
    options: dict[str, Any] = {
        "algorithms": [ROSS, BRANCH, L2T],
        "steps": 2,
        "size": 32,
        "max_seq_len": 3000,
        "lr": 1e-3,
    }
    alike(jobs.train(family, **options), jobs.train(family, prepared={"checkpointing": True}, **options))


@pytest.mark.parametrize("name", ["masked", "branch"])
def test_layers_run_twice_and_a_tap_is_the_first_pass(name: str) -> None:
    """The recomputed output has no graph to what the method reads: were it the tap, no gradient would come."""
    from opsin.algorithms.jarvis import JARVIS as Method

    made = Method(**(MASKED if name == "masked" else BRANCH)[1])
    drill = Bench(made, size=32, bidirectional=True)
    batch = drill.batch(jobs.mixed_samples(4))
    plain = drill.step(batch)
    checkpoint_layers(drill.model)
    drill.model.train()
    calls: list[int] = []
    layers = drill.model.anatomy.decoder_layers(drill.model.hf)
    handles = [
        layer.register_forward_pre_hook(lambda *_, n=n: calls.append(n)) for n, layer in enumerate(layers, 1)
    ]
    (part,) = drill.parts(batch)
    drill.state.batch, drill.state.loss = part, {}
    drill._tell("before_forward")
    drill.model(part)
    step = drill.model.step(part)
    tapped = dict(step.tapped if name == "masked" else step.branched)
    forwards = len(calls)
    assert tapped and forwards == (4 if name == "masked" else 4 + 2)
    drill._tell("after_loss")
    drill.model.zero_grad()
    drill.state.loss[made.name].backward()
    assert len(calls) > forwards  # run once more
    again = step.tapped if name == "masked" else step.branched
    assert all(again[key] is tapped[key] for key in tapped)
    for handle in handles:
        handle.remove()
    found = {n: p.grad for n, p in drill.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert found.keys() == plain[1].keys()
    for key, gradient in found.items():
        assert torch.allclose(gradient, plain[1][key], atol=1e-6), key


@pytest.mark.world
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_with_checkpointing_are_one_process_without(ranks, parallel: str) -> None:
    options: dict[str, Any] = {
        "samples": jobs.mixed_samples(8, "first_half"), "global_batch": 4, "steps": 2, "microbatch": 2,
        "algorithms": [ROSS, BRANCH, L2T, VIFT], "lr": 1e-3, **HIDING,
    }  # fmt: skip
    one = jobs.train(**options)
    two = ranks.run("jobs:train", parallel=parallel, prepared={"checkpointing": True}, **options)
    assert two[0]["fsdp"] == (parallel == "fsdp2")
    alike(one, two[0], 1e-4)
