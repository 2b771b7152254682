"""JARVIS however batches are cut and ranks are dealt, and beside ROSS and L2T."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.jarvis.cut import CODE
from opsin.algorithms.jarvis.functional import on_tokens
from opsin.algorithms.jarvis.sampler import BLOCKS
from opsin.algorithms.l2t import L2T
from opsin.algorithms.ross.views import Views
from opsin.data.batch import split_batch
from opsin.data.schema import stable_hash

import jobs
import zoo
from methods import Bench, LoudROSS, teacher

JARVIS_HERE, ROSS_HERE = "opsin.algorithms.jarvis:JARVIS", "methods:LoudROSS"
SMALL: dict[str, Any] = {"target": teacher(), "ntp_probability": 0.0, "layer": 2}
ROSS_SMALL: dict[str, Any] = {"target": {"name": "pixels", "cell": 4}, "width": 64, "min_visible": 1}
L2T_HERE = ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3})
MODES = ("masked", "unmasked")
VARIANTS: list[dict[str, Any]] = [{"text_loss": "masked"}, {"text_loss": "unmasked"}, {"text_loss": "unmasked", "see_pretext": True}, {"masks": "none"}]  # fmt: skip
NAMES = ["masked", "unmasked", "pretext", "none"]
CASES = [("llava", v) for v in VARIANTS] + [
    ("llava_next", VARIANTS[1]),
    ("qwen2_5_vl", VARIANTS[0]),
    ("qwen2_5_vl", VARIANTS[2]),
]
CASE_NAMES = [*NAMES, "next-unmasked", "qwen-masked", "qwen-pretext"]
HIDING = {"size": 32, "bidirectional": True}


def bench(family: str = "llava", also: tuple = (), **arguments: Any) -> Bench:
    method = JARVIS(**{**SMALL, **arguments})
    return Bench(method, family, also=also, size=32, bidirectional=True, max_seq_len=3000)


def samples() -> list[dict]:
    return [zoo.sample(i, images=(1, 0, 2)[i % 3], turns=1 + i % 2, size=[(40, 34), (64, 30), (32, 66)][i // 2 % 3])
            for i in range(8)]  # fmt: skip


def alike(a: tuple, b: tuple, tolerance: float = 1e-5) -> None:
    assert a[0] == pytest.approx(b[0], abs=tolerance) and a[0] != 0
    assert a[1].keys() == b[1].keys() and len(a[1]) > 5
    for name, gradient in a[1].items():
        assert torch.allclose(gradient, b[1][name], atol=tolerance, rtol=1e-4), name


# However the batch is cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "variant"), CASES, ids=CASE_NAMES)
def test_padding_packing_order_and_micro_batches_change_nothing(family: str, variant: dict) -> None:
    drill, found = bench(family, **{"ntp_probability": 0.3, **variant}), samples()
    reference = drill.step(drill.batch(found))
    for size in (4, 1):
        alike(reference, drill.step(drill.batch(found), size))
    mixed = random.Random(1).sample(found, len(found))
    alike(reference, drill.step(drill.batch(mixed, padding_side="left"), 2))
    alike(reference, drill.step(drill.batch(found, packing=True)))
    alike(reference, drill.step(drill.batch(mixed, packing=True, pad_to_multiple_of=64), 3))


@pytest.mark.parametrize(("family", "variant"), CASES, ids=CASE_NAMES)
def test_samples_without_pictures_or_masks_and_refused_ones_add_nothing(family: str, variant: dict) -> None:
    drill = bench(family, **variant)
    found = [s for i, s in enumerate(samples()) if i % 3 != 1][:3]
    text = [zoo.sample(90 + i, images=0, turns=2) for i in range(2)]
    alone = drill.step(drill.batch(found))
    alike(alone, drill.step(drill.batch([text[0], *found, text[1]]), 1))
    refused = zoo.sample(50, images=2)
    for packing in (False, True):
        batch = drill.batch([found[0], refused, *found[1:]], packing=packing)
        batch["refused"] = batch["document_uid"] == stable_hash(refused["id"])
        assert bool(batch["refused"].any())
        alike(alone, drill.step(batch, 2 if packing else None))
    # Nothing to predict at all: zero, from the same modules.
    head = {f"net.auxiliary.jarvis.{n}" for n, _ in drill.model.net.auxiliary["jarvis"].named_parameters()}
    everyone = drill.batch(found)
    everyone["refused"] = torch.ones_like(everyone["refused"])
    for batch in (drill.batch(text), everyone):
        for size in (None, 1):
            assert drill.step(batch, size) == (0.0, {})
            assert head <= {n for n, p in drill.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text_loss", MODES)
def test_several_pictures_are_the_mean_over_their_predictions(text_loss: str) -> None:
    """A document with two pictures, and the sum of what each view gives."""
    drill = bench("llava_next", text_loss=text_loss)
    method: Any = drill.method
    (part,) = drill.parts(drill.batch([zoo.sample(1, images=2, size=(40, 34))]))
    views = len(part["grids"])
    assert views >= 4 and part["view_image"].unique().tolist() == [0, 1]
    assert part["jarvis/views"] == tuple(range(views))
    codes = [part[CODE][part["patch_view"] == v] for v in range(views)]
    assert len({tuple(c.tolist()) for c in codes}) == views
    whole = method.target.moments(drill.model.pictures(part), part["grids"])
    at = part["patch_view"][part["jarvis/targets"]]
    for v in range(views):
        own = Views.of(part["grids"]).view == v
        assert torch.allclose(method.targets(drill.model, part)[at == v], whole[own][(codes[v] & BLOCKS) != 0], atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("text_loss", MODES)
def test_a_whole_training_is_cut_into_micro_batches_without_a_change(text_loss: str) -> None:
    spec = [(JARVIS_HERE, {**SMALL, "text_loss": text_loss, "ntp_probability": 0.4})]
    whole = jobs.train(steps=1, algorithms=spec, **HIDING)
    parts = jobs.train(steps=1, algorithms=spec, microbatch=1, accumulate_on_tokens=True, **HIDING)
    assert whole["keys"][0] == ["loss/train/total", "loss/train/lm", "loss/train/jarvis"]
    assert whole["losses"][0] == pytest.approx(parts["losses"][0], abs=1e-5)
    for name, gradient in whole["gradients"][0].items():
        assert torch.allclose(gradient, parts["gradients"][0][name], atol=1e-5), name


@pytest.mark.world
@pytest.mark.parametrize(
    ("parallel", "family", "arguments"),
    [("ddp", "llava", {"text_loss": "masked"}), pytest.param("fsdp2", "llava", {"text_loss": "masked", "train": "proj+early"}, marks=pytest.mark.slow),
     ("ddp", "llava", {"text_loss": "unmasked", "train": "proj"}), ("fsdp2", "llava", {"text_loss": "unmasked", "train": "proj"}),
     ("fsdp2", "llava_next", {"text_loss": "unmasked"}), pytest.param("ddp", "llava_next", {"text_loss": "unmasked"}, marks=pytest.mark.slow),
     ("fsdp2", "qwen2_5_vl", {"text_loss": "masked", "ntp_probability": 0.5}), pytest.param("fsdp2", "llava", {"masks": "none"}, marks=pytest.mark.slow),
     ("fsdp2", "qwen2_5_vl", {"text_loss": "unmasked", "see_pretext": True, "weighting": "block"}),
     ("fsdp2", "llava", {"ntp_scope": "step", "ntp_probability": 0.5, "text_loss": "unmasked", "masks": {"preset": "parity", "ctx_truncate": "none"}})],
)  # fmt: skip
def test_two_ranks_give_the_numbers_of_one_with_pictures_on_one_rank_only_and_then_none(
    ranks, parallel: str, family: str, arguments: dict
) -> None:
    clip = ("opsin.algorithms.clipping:GradientClippingByPart", {"clipping_threshold": 0.5})
    spec = [(JARVIS_HERE, {**SMALL, "log_interval": 1, **arguments}), clip]
    options = {
        "samples": [*jobs.mixed_samples(8, "first_half"), *jobs.mixed_samples(4, "none")],
        "global_batch": 4, "steps": 3, "microbatch": 1, "lr": 1e-3, **HIDING,
    }  # fmt: skip
    one = jobs.train(family, algorithms=spec, **options)
    two = ranks.run("jobs:train", family=family, algorithms=spec, parallel=parallel, **options)
    assert two[0]["keys"] == two[1]["keys"] == one["keys"] and two[0]["fsdp"] == (parallel == "fsdp2")
    if parallel == "fsdp2":
        assert two[0]["plain_parameters"] == []
    for step, (a, b) in enumerate(zip(one["losses"], two[0]["losses"], strict=True)):
        assert (a["loss/train/jarvis"] != 0) == (step < 2) or "ntp_scope" in arguments
        for key, value in a.items():
            assert value == pytest.approx(b[key], abs=1e-4), (step, key)
    for name, gradient in one["gradients"][0].items():
        assert torch.allclose(gradient, two[0]["gradients"][0][name], atol=1e-5), name
    for a, b in zip(one["logged"], two[0]["logged"], strict=True):
        for key in [k for k in a if k.startswith("jarvis/")]:
            assert a[key] == pytest.approx(b[key], abs=1e-4), key


@pytest.mark.world
def test_a_frozen_language_model_is_differentiated_on_ranks_without_pictures_too(ranks) -> None:
    """No method: FSDP2 gathers a layer's parameters in the backward pass of those ranks that have one."""
    options = {
        "samples": jobs.mixed_samples(8, "first_half"), "global_batch": 4, "steps": 2, "microbatch": 1, "lr": 1e-3,
        "trainable": {"vision_tower": False, "mm_projector": True, "language_model": False},
    }  # fmt: skip
    one = jobs.train(**options)
    two = ranks.run("jobs:train", parallel="fsdp2", **options)
    for a, b in zip(one["losses"], two[0]["losses"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


# Beside ROSS ---------------------------------------------------------------------------------------------------


def both(family: str, **arguments: Any) -> Bench:
    method = LoudROSS(**ROSS_SMALL)
    other = JARVIS(**{**SMALL, **arguments})
    return Bench(method, family, also=(other,), size=32, bidirectional=True, max_seq_len=3000)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_ross_neither_counts_nor_reads_what_jarvis_hides(family: str) -> None:
    drill = both(family, text_loss="masked")
    batch = drill.batch(samples()[:3])
    (part,) = drill.parts(batch)
    drill.state.batch, drill.state.loss = part, {}
    drill._tell("before_forward")
    step = drill.model.step(part)
    code = on_tokens(part[CODE], part["patch_position"], part["input_ids"].shape, 0)
    assert step.hidden is not None and torch.equal(step.hidden, (code & BLOCKS) != 0)
    loss, gradients = drill.step(batch)
    latent: Any = drill.model.net.auxiliary["jarvis"].latent
    assert loss > 0 and not any("jarvis" in n for n in gradients)
    with torch.no_grad():
        latent.z.copy_(5 * torch.randn(latent.z.shape))
    again, others = drill.step(batch)
    assert again == loss and gradients.keys() == others.keys()
    assert all(torch.equal(g, others[n]) for n, g in gradients.items())


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_jarvis_beside_whole_texts_hides_nothing_from_ross(family: str) -> None:
    drill = both(family, text_loss="unmasked")
    batch = drill.batch(samples()[:3])
    loss, gradients = drill.step(batch)
    assert drill.also[0].branch and drill.model.step(batch).hidden is None
    alone = Bench(LoudROSS(**ROSS_SMALL), family, size=32, bidirectional=True, max_seq_len=3000)
    plain, others = alone.step(alone.batch(samples()[:3]))
    assert loss == plain and gradients.keys() == others.keys()
    assert all(torch.equal(g, others[n]) for n, g in gradients.items())


@pytest.mark.parametrize("text_loss", MODES)
def test_the_order_of_methods_changes_no_number(text_loss: str) -> None:
    ours, ross = (JARVIS_HERE, {**SMALL, "text_loss": text_loss}), (ROSS_HERE, ROSS_SMALL)
    orders = ([ours, L2T_HERE, ross], [ross, L2T_HERE, ours])
    a, b = (jobs.train(steps=2, global_batch=4, algorithms=order, **HIDING) for order in orders)
    total = "loss/train/total"
    for x, y in zip(a["losses"], b["losses"], strict=True):
        assert x.pop(total) == pytest.approx(y.pop(total), abs=1e-6)  # summed in the order of methods
    assert a["losses"][0] == b["losses"][0] and a["losses"][1] == pytest.approx(b["losses"][1], abs=1e-6)
    for name, gradient in a["gradients"][0].items():
        assert torch.allclose(gradient, b["gradients"][0][name], atol=1e-6), name


# Beside L2T ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text_loss", MODES)
def test_what_words_are_learnt_is_l2ts_alone(text_loss: str) -> None:
    found = []
    drill = bench(text_loss=text_loss)
    l2t = L2T(**L2T_HERE[1])
    drill.state.dataloader = drill.state.train_dataloader
    l2t.fit_start(drill.model, drill.state, drill.logger)
    for methods in ((l2t, drill.method), (l2t,)):
        batch = drill.state.batch = drill.batch(samples())
        for event in ("after_dataloader", "batch_start"):
            for method in (m for m in methods if hasattr(m, event)):
                getattr(method, event)(drill.model, drill.state, drill.logger)
        found.append(split_batch(batch, 4))
    for a, b in zip(*found, strict=True):
        for key in (k for k in b if k.startswith("label")):
            assert torch.equal(a[key], b[key]), key
        assert torch.equal(a["denominators"]["lm"], b["denominators"]["lm"])
