"""Placebos of ROSS and JARVIS: each picture is held against another one of its micro-batch, and all else stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.jarvis.cut import CODE, WEIGHT
from opsin.algorithms.partners import FOUND, PATCHES, VIEWS, partners
from opsin.algorithms.ross import ROSS
from opsin.data.patch_targets import COLUMN
from opsin.training.compatibility import of_method

import jobs
import zoo
from methods import Bench, LoudROSS, teacher

ROSS_SMALL: dict[str, Any] = {"target": {"name": "pixels", "cell": 4}, "width": 64}
JARVIS_SMALL: dict[str, Any] = {"target": teacher(), "ntp_probability": 0.0, "layer": 2}
OBJECTIVES = [{}, {"head": "vit", "letterbox": "mask"}, {"objective": "cosine"}, {"objective": "decoded_mse"}]


def ross(family: str = "llava", **arguments: Any) -> Bench:
    return Bench(LoudROSS(**{**ROSS_SMALL, **arguments}), family)


def jarvis(family: str = "llava", **arguments: Any) -> Bench:
    method = JARVIS(**{**JARVIS_SMALL, **arguments})
    return Bench(method, family, size=32, bidirectional=True, max_seq_len=3000)


def pictures(count: int, size: tuple[int, int] = (20, 16), each: int = 1) -> list[dict]:
    return [zoo.sample(i, images=each, size=size) for i in range(count)]


def hidden_states(part: dict[str, Any]) -> torch.Tensor:
    made = torch.randn(*part["input_ids"].shape, 32, generator=torch.Generator().manual_seed(5))
    return made.requires_grad_()


def rolled(part: dict[str, Any]) -> dict[str, Any]:
    """The same micro-batch (one picture a view, one grid) that shows the next picture in each place."""
    moved = {key: part[key].roll(-1, 0) for key in ("pixel_values", "view_box")}
    return {k: v for k, v in part.items() if not k.startswith("partners/")} | moved


# Who is whose partner ------------------------------------------------------------------------------------------

GRIDS = [(2, 2), (1, 4), (2, 3)]
TILINGS = st.lists(st.sampled_from(GRIDS), min_size=1, max_size=4)  # of one picture
ROWS = st.lists(st.lists(TILINGS, max_size=3), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(rows=ROWS)
def test_partners_are_those_of_a_plain_loop(rows: list[list[list[tuple[int, int]]]]) -> None:
    views = [(r, i, g) for r, row in enumerate(rows) for i, tiling in enumerate(row) for g in tiling]
    part = {
        "view_row": torch.tensor([v[0] for v in views], dtype=torch.int64),
        "view_document": torch.zeros(len(views), dtype=torch.int16),
        "view_image": torch.tensor([v[1] for v in views], dtype=torch.int16),
        "view_grid": torch.tensor([v[2] for v in views], dtype=torch.int64).view(-1, 2),
    }
    found = partners(part)
    starts = [sum(r * c for _, _, (r, c) in views[:i]) for i in range(len(views))]
    patches: list[int] = []
    for i, (row, image, grid) in enumerate(views):
        same = [j for j, v in enumerate(views) if v[2] == grid]
        own = [j for j in same if views[j][:2] == (row, image)]
        after = [j for j in same if j > own[-1]] + [j for j in same if j < own[0]]
        expected = after[own.index(i) % len(after)] if after else i
        assert found[VIEWS][i] == expected and bool(found[FOUND][i]) == bool(after)
        patches += range(starts[expected], starts[expected] + grid[0] * grid[1])
    assert found[PATCHES].tolist() == patches


# ROSS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", OBJECTIVES, ids=["dit", "vit", "cosine", "decoded"])
def test_ross_reconstructs_the_next_picture(arguments: dict[str, Any]) -> None:
    own, other = ross(**arguments), ross(shuffle_targets=True, **arguments)
    samples = [zoo.sample(i, size=size) for i, size in enumerate([(20, 16), (16, 33), (40, 18), (16, 16)])]
    (part,), (shuffled,) = own.parts(own.batch(samples)), other.parts(other.batch(samples))
    assert not any(key.startswith("partners/") for key in part) and shuffled[VIEWS] == (1, 2, 3, 0)
    state = hidden_states(part)
    plain, loss, expected = (
        drill.method.local_loss(drill.model, batch, state)  # type: ignore[attr-defined]
        for drill, batch in ((own, part), (other, shuffled), (own, rolled(shuffled)))
    )
    assert torch.equal(loss, expected) and not torch.equal(loss, plain)
    pull, wanted = (torch.autograd.grad(x, state)[0] for x in (loss, expected))
    assert torch.equal(pull, wanted) and bool(pull.any())


def test_ross_takes_stored_targets_of_the_next_picture() -> None:
    own, other = ross(objective="cosine"), ross(objective="cosine", shuffle_targets=True)
    (part,) = other.parts(other.batch(pictures(3)))
    own.method._take_stored = other.method._take_stored = True  # type: ignore[attr-defined]
    stored = torch.randn(3, 16, 48).bfloat16()
    state = hidden_states(part)
    loss = other.method.local_loss(other.model, {**part, COLUMN: stored.flatten(0, 1)}, state)  # type: ignore[attr-defined]
    moved = stored.roll(-1, 0).flatten(0, 1)
    assert torch.equal(loss, own.method.local_loss(own.model, {**part, COLUMN: moved}, state))  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [{}, {"objective": "decoded_mse"}], ids=["dit", "decoded"])
def test_ross_leaves_out_a_view_without_another_picture_of_its_grid(arguments: dict[str, Any]) -> None:
    drill = ross("qwen2_5_vl", shuffle_targets=True, **arguments)
    same = [zoo.sample(i, size=(40, 40)) for i in (1, 2)]
    alone = drill.batch([same[0], zoo.sample(3, size=(80, 40)), same[1]])
    (part,) = drill.parts(alone)
    assert part[VIEWS] == (2, 1, 0) and part[FOUND].tolist() == [True, False, True]
    state = hidden_states(part)
    loss = drill.method.local_loss(drill.model, part, state)  # type: ignore[attr-defined]
    (pull,) = torch.autograd.grad(loss, state)
    moved = pull.flatten(0, 1)[part["patch_position"]].any(-1)
    assert torch.equal(moved, part["patch_view"] != 1) and float(loss.detach()) > 0
    two, _ = drill.step(drill.batch(same))
    assert drill.step(alone)[0] == pytest.approx(
        two * 2 / 3, abs=1e-6
    )  # three are counted, as hidden ones are
    assert drill.step(drill.batch(same), 1) == (0.0, {})  # micro-batches of one picture


# JARVIS --------------------------------------------------------------------------------------------------------

VARIANTS = [{"text_loss": "masked"}, {"text_loss": "unmasked"}, {"masks": "none"}, {"loss": "smooth_l1"}]


@pytest.mark.parametrize("stored", [False, True], ids=["computed", "stored"])
@pytest.mark.parametrize("arguments", VARIANTS, ids=["masked", "unmasked", "none", "smooth"])
def test_jarvis_predicts_the_next_picture_at_the_same_places(arguments: dict[str, Any], stored: bool) -> None:
    own, other = jarvis(**arguments), jarvis(shuffle_targets=True, **arguments)
    a: Any = own.method
    b: Any = other.method
    samples = [pictures(1)[0], *pictures(4)[1:], zoo.sample(9, images=0)]
    (part,), (shuffled,) = own.parts(own.batch(samples)), other.parts(other.batch(samples))
    for key in ("jarvis/targets", "jarvis/weights", CODE, WEIGHT):
        assert torch.equal(part[key], shuffled[key])
    patches = part["grids"][0][0] * part["grids"][0][1]
    at = shuffled["jarvis/targets"]
    assert torch.equal(shuffled["jarvis/sources"], (at + patches) % (4 * patches))
    next_one = {**part, "pixel_values": part["pixel_values"].roll(-1, 0)}
    if stored:
        a._take_stored = b._take_stored = True
        values = torch.randn(4, patches, 64).bfloat16()
        shuffled[COLUMN], next_one[COLUMN] = values.flatten(0, 1), values.roll(-1, 0).flatten(0, 1)
        part[COLUMN] = shuffled[COLUMN]
    target = b.targets(other.model, shuffled)
    assert torch.allclose(target, a.targets(own.model, next_one), atol=1e-6)
    assert not torch.allclose(target, a.targets(own.model, part), atol=1e-2)
    if not stored:
        loss, gradients = other.step(other.batch(samples))
        plain, _ = own.step(own.batch(samples))
        assert loss != plain and len(gradients) > 5


@pytest.mark.parametrize("text_loss", ["masked", "unmasked"])
def test_jarvis_leaves_a_view_as_it_is_that_has_no_other_picture(text_loss: str) -> None:
    drill = jarvis("llava_next", shuffle_targets=True, text_loss=text_loss)
    wide, tall = zoo.sample(1, size=(64, 32)), zoo.sample(2, size=(32, 64))
    (part,) = drill.parts(drill.batch([wide, tall]))  # thumbnails of one size, mosaics of two
    alone = ~partners(part)[FOUND]
    assert alone.sum() == 2 and len(part["grids"]) == 4
    assert not bool(part[CODE][alone[part["patch_view"]]].any())
    assert part["jarvis/views"] == tuple((~alone).nonzero().flatten().tolist()) == part["jarvis/teaching"]
    assert drill.step(drill.batch([wide, tall]))[0] != 0
    single = drill.step(drill.batch([wide, tall]), 1)
    assert single == (0.0, {})


def test_jarvis_looks_at_its_predictions_beside_the_picture_itself() -> None:
    drill = jarvis(shuffle_targets=True)
    method: Any = drill.method
    batch = drill.batch(pictures(3))
    method.enter(batch, always=True)
    looked_at = batch["cut/jarvis"]
    (part,) = drill.parts(batch)  # as a training step
    assert not torch.equal(part["jarvis/sources"], part["jarvis/targets"])
    own = looked_at(part)
    assert torch.equal(own["jarvis/sources"], own["jarvis/targets"])


# Both ----------------------------------------------------------------------------------------------------------

HERE = {
    "ross": ("methods:LoudROSS", ROSS_SMALL),
    "jarvis": ("opsin.algorithms.jarvis:JARVIS", JARVIS_SMALL),
}


@pytest.mark.parametrize("name", HERE)
def test_a_run_learns_something_else_and_off_is_off(name: str) -> None:
    method, small = HERE[name]
    shape: dict[str, Any] = {"size": 32, "bidirectional": True, "global_batch": 4}
    plain, off, on, again = (
        jobs.train(algorithms=[(method, {**small, **extra})], **shape)
        for extra in ({}, {"shuffle_targets": False}, {"shuffle_targets": True}, {"shuffle_targets": True})
    )
    assert plain["losses"] == off["losses"] and on["losses"] == again["losses"]
    assert all(torch.equal(v, off["weights"][k]) for k, v in plain["weights"].items())
    moved = [k for k, v in plain["weights"].items() if not torch.equal(v, on["weights"][k])]
    assert moved and on["keys"] == plain["keys"]
    first, other = plain["losses"][0], on["losses"][0]
    assert other[f"loss/train/{name}"] != first[f"loss/train/{name}"]
    assert other["loss/train/lm"] == first["loss/train/lm"]  # before the first update


@pytest.mark.parametrize("method", [ROSS(**ROSS_SMALL, shuffle_targets=True), JARVIS(**JARVIS_SMALL, shuffle_targets=True)])  # fmt: skip
def test_micro_batches_of_one_sample_are_warned_of(method: Any) -> None:
    def said(size: int | None) -> list[str]:
        return [v.why for v in of_method(method, {}, {}, {"device_train_microbatch_size": size}.__getitem__)]

    assert any("no other one in its micro-batch" in line for line in said(1))
    assert not said(2) and not said(None)
    assert "shuffle_targets=True" in repr(method)
