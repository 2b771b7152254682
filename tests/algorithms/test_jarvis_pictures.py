"""JARVIS's strips: colours of features, what a column shows of which patch, models with views of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.jarvis.cut import CODE
from opsin.algorithms.jarvis.functional import compared
from opsin.algorithms.jarvis.pictures import COLOURS, JARVISPictures, Palette, blocks_shown, edge, enlarged
from opsin.algorithms.jarvis.sampler import BLOCKS, CONTEXT, MASKED, MOST_BLOCKS
from opsin.data.batch import split_batch
from opsin.models.errors import UserError

import zoo
from methods import Bench

TOWER = {"name": "tower", "path": "scenes"}
SIDE = 96


def _strips(
    samples: list[dict], family: str = "llava", **options: Any
) -> tuple[Bench, JARVISPictures, dict[str, Any]]:
    """A model with JARVIS, its callback made ready for some samples, their batch."""
    bench = Bench(JARVIS(target=TOWER, **options), family, size=32, bidirectional=True, max_seq_len=2000)
    shown = JARVISPictures(remote="held-out", side=SIDE)
    batch = bench.batch(samples)
    shown.enter(bench.method, bench.model, batch)
    batch = split_batch(batch, None, training=False)[0]
    shown.prepare(bench.method, bench.model, batch)
    return bench, shown, batch


@torch.no_grad()
def _draw(bench: Bench, shown: JARVISPictures, batch: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    bench.model.eval()
    columns = shown.draw(bench.model, bench.method, batch)
    bench.model.end_step()
    return dict(columns)


def _patches(picture: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The middle pixel of each patch, where no outline runs: (rows * columns, 3)."""
    rows, columns = (
        ((torch.arange(g) + 0.5) * s / g).long() for g, s in zip(grid, picture.shape[1:], strict=True)
    )
    return picture[:, rows][:, :, columns].flatten(1).T


def test_colours_are_the_three_directions_in_which_features_differ_most() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64)).Q
    at = torch.randn(400, 3, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 3.0, 2.0])
    noise = 0.01 * torch.randn(400, 16, generator=generator, dtype=torch.float64)
    features = 50 * basis[:, 3] + at @ basis[:, :3].T + noise  # the mean is far larger than what differs
    palette = Palette.of(features)
    seen = palette(features)
    for channel in range(3):
        along, got = at[:, channel], seen[:, channel].double()
        inside = (got > 0) & (got < 1)
        assert 0.95 < inside.double().mean() < 0.97  # 2 in 100 are cut off at either end
        assert abs(torch.corrcoef(torch.stack([along, got])[:, inside])[0, 1]) > 0.99
    largest = palette.directions.gather(0, palette.directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    assert torch.equal(Palette.of(features)(features), seen)
    assert torch.equal(Palette.of(features.flip(0))(features).round(decimals=4), seen.round(decimals=4))


@pytest.mark.parametrize("features", [torch.ones(9, 5), torch.randn(9, 2), torch.zeros(1, 4)])
def test_what_differs_in_fewer_directions_is_grey_in_the_others(features: torch.Tensor) -> None:
    seen = Palette.of(features)(features)
    assert seen.shape == (len(features), 3) and seen.isfinite().all() and (seen[:, 2] == 0.5).all()


def test_every_patch_of_the_blocks_picture_shows_what_it_is() -> None:
    code = torch.full((4, 6), MASKED | CONTEXT, dtype=torch.int16)
    code[1:3, 0:2] = MASKED | 1
    code[1:3, 2:3] = MASKED | 3
    code[1:3, 3:4] = MASKED | 2
    code[3] = MASKED
    shown = blocks_shown(torch.full((3, 8, 12), 0.8), code, (80, 120))
    seen = _patches(shown, (4, 6)).view(4, 6, 3)
    assert torch.allclose(seen[0], torch.tensor(0.8)) and torch.allclose(seen[3], torch.tensor(0.2))
    tinted = 0.55 * 0.8 + 0.45 * torch.stack([COLOURS[0], COLOURS[:2].mean(0), COLOURS[1]])
    assert torch.allclose(seen[1, [0, 2, 3]], tinted)
    # Both outlines run through where blocks overlap: block 2's left side, block 1's right side.
    assert torch.equal(shown[:, 30, 40], COLOURS[1]) and torch.equal(shown[:, 30, 59], COLOURS[0])
    assert torch.equal(shown[:, 30, 0], COLOURS[0])  # the edge of the picture is one of the block
    assert len(COLOURS.unique(dim=0)) == MOST_BLOCKS


def test_an_edge_is_one_pixel_inside() -> None:
    inside = torch.zeros(1, 5, 6, dtype=torch.bool)
    inside[0, 1:4, 1:5] = True
    line = edge(inside)[0]
    assert int(line.sum()) == 12 - 2 and not line[2, 2:4].any() and not (line & ~inside[0]).any()


@pytest.mark.parametrize("text_loss", ["masked", "unmasked"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_hidden_patches_show_predictions_and_visible_ones_the_target(
    family: str, text_loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [zoo.sample(1, size=(80, 64)), zoo.sample(2, size=(64, 48), images=2)]
    bench, shown, batch = _strips(samples, family, text_loss=text_loss)
    views, grids = batch["jarvis/views"], batch["grids"]
    assert len(views) >= 2 and (family == "llava" or len({grids[i] for i in views}) > 1)
    drawn = _draw(bench, shown, batch)
    assert list(drawn) == ["picture", "blocks", "target", "predicted"]
    assert {len(column) for column in drawn.values()} == {len(views)}
    real = bench.method.features(bench.model, batch)
    method: Any = bench.method
    monkeypatch.setattr(method, "predictions", lambda model, batch: 7 * real[batch["jarvis/among"]])
    perfect = _draw(bench, shown, batch)  # predictions of another length
    codes = batch[CODE].split([r * c for r, c in grids])
    for n, i in enumerate(views):
        assert all(max(drawn[title][n].shape[1:]) == SIDE for title in ("blocks", "target", "predicted"))
        hidden = (codes[i] & BLOCKS) != 0
        target, ours, same = (_patches(p[n], grids[i]) for p in (drawn["target"], drawn["predicted"], perfect["predicted"]))  # fmt: skip
        pale = 1 - 0.3 * (1 - target)
        assert torch.allclose(ours[~hidden], pale[~hidden]) and torch.allclose(same[~hidden], pale[~hidden])
        assert torch.allclose(same[hidden], target[hidden], atol=1e-4)
        assert not torch.allclose(ours[hidden], target[hidden], atol=0.05)


def test_another_picture_gives_another_map_and_the_same_one_the_same() -> None:
    same = [zoo.sample(1, size=(32, 32)), zoo.sample(2, size=(32, 32))]
    bench, shown, batch = _strips(same)
    first, again = _draw(bench, shown, batch), _draw(bench, shown, batch)
    for title in first:
        assert all(torch.equal(a, b) for a, b in zip(first[title], again[title], strict=True))
        assert not torch.allclose(first[title][0], first[title][1], atol=0.02), title
    # With one mask for both, what differs are the predictions themselves.
    code = batch[CODE].view(2, 64)
    hidden = ((code & BLOCKS) != 0).all(0)
    maps = [_patches(p, (8, 8)) for p in first["predicted"]]
    assert hidden.any() and not torch.allclose(maps[0][hidden], maps[1][hidden], atol=1e-3)


def test_masks_are_the_same_whatever_the_runs_seed_and_share_of_masked_samples() -> None:
    codes = [
        _strips([zoo.sample(1, size=(32, 32))], **options)[2][CODE]
        for options in ({}, {"ntp_probability": 0.9}, {"ntp_scope": "step", "ntp_probability": 0.9})
    ]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2]) and codes[0].any()


def test_what_is_drawn_is_not_counted_as_trained_on() -> None:
    bench, *_ = _strips([zoo.sample(1, size=(32, 32))])
    assert not bench.method._views.any()  # type: ignore[attr-defined]


def test_without_masks_every_patch_is_predicted() -> None:
    bench, shown, batch = _strips([zoo.sample(1, size=(32, 32))], masks="none")
    drawn = _draw(bench, shown, batch)
    assert list(drawn) == ["picture", "target", "predicted"]
    colours = shown._palette(
        compared(bench.method.predictions.__self__.features(bench.model, batch), "cosine")
    )
    assert torch.allclose(_patches(drawn["target"][0], (8, 8)), colours)
    grid = drawn["predicted"][0]
    assert torch.equal(grid, enlarged(grid[:, 6::12, 6::12], grid.shape[1:]))  # no pale patch, no outline
    bench.model.step(batch).taps.add(bench.method.tap)  # type: ignore[attr-defined]
    with torch.no_grad():
        bench.model(batch)
        predicted = compared(bench.method.predictions(bench.model, batch), "cosine")  # type: ignore[attr-defined]
    assert torch.allclose(_patches(grid, (8, 8)), shown._palette(predicted), atol=1e-5)


def test_the_other_loss_has_predictions_with_a_length_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, shown, batch = _strips([zoo.sample(1, size=(32, 32))], masks="none", loss="smooth_l1")
    real = compared(bench.method.features(bench.model, batch), "smooth_l1")  # type: ignore[attr-defined]
    method: Any = bench.method
    monkeypatch.setattr(method, "predictions", lambda model, batch: real)
    drawn = _draw(bench, shown, batch)
    assert torch.allclose(drawn["predicted"][0], drawn["target"][0], atol=1e-5)
    monkeypatch.setattr(method, "predictions", lambda model, batch: 2 * real)
    assert not torch.allclose(_draw(bench, shown, batch)["predicted"][0], drawn["target"][0], atol=0.1)


def test_views_that_are_too_small_are_left_out_and_nothing_else_is_refused() -> None:
    small, large = zoo.sample(1, size=(32, 32)), zoo.sample(2, size=(160, 160))
    bench, shown, batch = _strips([small, large], "qwen2_5_vl")
    assert sorted(batch["grids"]) == [(4, 4), (10, 10)]
    drawn = _draw(bench, shown, batch)
    assert len(drawn["picture"]) == 1 and drawn["picture"][0].shape == (3, 80, 80)
    with pytest.raises(UserError, match="of 4x4 patches, on which no blocks fit; use larger") as refused:
        _strips([small], "qwen2_5_vl")
    assert "\n" not in str(refused.value) and "callbacks.jarvis_pictures.remote" in str(refused.value)
