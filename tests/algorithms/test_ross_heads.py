"""ROSS's parts on tensors: schedule, folding, attention within views, heads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from opsin.algorithms.ross.diffusion import (
    OBJECTIVES,
    cosine_alpha_bar,
    ignoring_the_condition,
)
from opsin.algorithms.ross.functional import Draws, draw_noise, reconstruction_loss
from opsin.algorithms.ross.heads import HEADS, make_head, positions_2d, scaled_width
from opsin.algorithms.ross.targets.pixels import PixelTarget
from opsin.algorithms.ross.views import Views
from opsin.models.errors import UserError
from opsin.models.randomness import view_keys
from opsin.models.targets.base import Target, fold, unfold

from methods import loud

GRIDS = [(4, 4), (2, 3), (4, 4), (1, 7), (3, 5)]
P = 60


def noise(
    views: Views, count: int, draws: int = 4, dim: int = 8, seed: int = 1, timesteps: int = 1000
) -> Draws:
    zero = torch.zeros(count, dtype=torch.int64)
    return draw_noise(view_keys(seed, torch.arange(count), zero, zero, zero), views, draws, dim, timesteps)


def rows(views: Views, head: nn.Module, condition: torch.Tensor, **given: Any) -> torch.Tensor:
    objective = OBJECTIVES["epsilon" if given["draws"] is not None else "mse"]
    return reconstruction_loss(head, condition, given["target"], views, objective, given["draws"], cosine_alpha_bar().float())  # fmt: skip


# Schedule and folding ----------------------------------------------------------------------------------------


def test_2_the_schedule_is_the_papers_to_1e_9() -> None:
    golden = {0: 0.9999587158, 10: 0.9992789038, 100: 0.9715756818, 250: 0.8458879865, 500: 0.4922851724,
              750: 0.1431786464, 900: 0.0236161088}  # fmt: skip
    kept = cosine_alpha_bar()
    assert kept.dtype == torch.float64 and len(kept) == 1000 and bool((kept.diff() < 0).all())
    for t, value in golden.items():
        assert float(kept[t]) == pytest.approx(value, abs=1e-9)
    assert float(kept[999]) == pytest.approx(2.42877e-9, rel=1e-5)
    assert ignoring_the_condition() == pytest.approx(0.496, abs=5e-4)


def test_the_496_is_what_the_best_blind_guess_reaches() -> None:
    """By sampling, not by the formula: white targets, guess sqrt(1 - alpha-bar) z_t."""
    kept, z0, e = (
        cosine_alpha_bar()[:, None],
        torch.randn(1000, 400).double(),
        torch.randn(1000, 400).double(),
    )
    noisy = kept.sqrt() * z0 + (1 - kept).sqrt() * e
    assert float((e - (1 - kept).sqrt() * noisy).square().mean()) == pytest.approx(0.496, abs=0.01)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), channels=st.integers(1, 4), by=st.integers(1, 4))
def test_3_a_folded_token_is_its_own_window(rows: int, columns: int, channels: int, by: int) -> None:
    maps = torch.randn(2, channels, rows * by, columns * by)
    tokens = fold(maps, by)
    assert tokens.shape == (2, rows * columns, channels * by * by)
    for r in range(rows):
        for c in range(columns):
            window = maps[:, :, r * by : (r + 1) * by, c * by : (c + 1) * by]
            for channel, i, j in [(0, 0, 0), (channels - 1, by - 1, 0), (channels - 1, 0, by - 1)]:
                told = tokens[:, r * columns + c, channel * by * by + i * by + j]
                assert torch.equal(told, window[:, channel, i, j])
    assert torch.equal(unfold(tokens, (rows, columns), by), maps)


# Views -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    grids=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=7),
    seed=st.integers(0, 999),
    share=st.sampled_from([None, 0.0, 0.3, 0.7, 1.0]),
)
def test_attention_equals_a_loop_over_views(
    grids: list[tuple[int, int]], seed: int, share: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [r * c for r, c in grids]
    total = sum(sizes)
    visible = None if share is None else torch.rand(total, generator=generator) < share
    views = Views.of(grids, visible=visible)
    assert views.row.tolist() == [r for h, w in grids for r in range(h) for _ in range(w)]
    assert views.column.tolist() == [c for h, w in grids for _ in range(h) for c in range(w)]
    q, k, v = (torch.randn(2, total, 2, 4, generator=generator).requires_grad_() for _ in range(3))
    start, parts = 0, []
    for size in sizes:
        own = slice(start, start + size)
        score = torch.einsum("kihd,kjhd->khij", q[:, own], k[:, own]) / 2
        if visible is not None and bool(visible[own].any()):
            score = score.masked_fill(~visible[own], -math.inf)
        parts.append(torch.einsum("khij,kjhd->kihd", score.softmax(-1), v[:, own]))
        start += size
    wanted, got = torch.cat(parts, 1), views.attend(q, k, v)
    assert torch.allclose(got, wanted, atol=1e-5)
    pull = torch.randn(got.shape, generator=generator)
    for a, b in zip(torch.autograd.grad((got * pull).sum(), (q, k, v)), torch.autograd.grad((wanted * pull).sum(), (q, k, v)), strict=True):  # fmt: skip
        assert bool(a.isfinite().all()) and torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_views_together_are_views_one_at_a_time(name: str) -> None:
    head = loud(make_head(name, 12, 8, depth=2, width=64))
    views, z0 = Views.of(GRIDS), torch.randn(P, 8)
    condition = torch.randn(P, 12, requires_grad=True)
    draws = noise(views, len(GRIDS)) if name in ("dit", "vit") else None
    together = rows(views, head, condition, target=z0, draws=draws)
    start, alone = 0, []
    for i, (r, c) in enumerate(GRIDS):
        own = slice(start, start + r * c)
        part = None if draws is None else Draws(draws.time[:, i : i + 1], draws.noise[:, own])
        alone.append(rows(Views.of([(r, c)]), head, condition[own], target=z0[own], draws=part))
        start += r * c
    assert torch.allclose(together, torch.cat(alone), atol=1e-5, rtol=1e-4)
    a, b = (torch.autograd.grad(x.sum(), [condition, *head.parameters()]) for x in (together, torch.cat(alone)))  # fmt: skip
    assert all(torch.allclose(x, y, atol=1e-3, rtol=1e-3) for x, y in zip(a, b, strict=True))


# Heads -------------------------------------------------------------------------------------------------------


def line(inner: int, outer: int) -> int:
    return inner * outer + outer


def expected_size(name: str, d: int, w: int, depth: int, tokens: int = 729, c: int = 64) -> int:
    block = line(w, 3 * w) + line(w, w) + line(w, 4 * w) + line(4 * w, w)
    block += line(w, 6 * w) if name == "dit" else 2 * 2 * w
    size = line(c, w) + line(256, w) + line(w, w) + line(d, w) + depth * block + line(w, 2 * w) + line(w, c)
    return size if name == "dit" else size + 2 * d + tokens * d


@pytest.mark.parametrize(
    ("name", "d", "depth", "width", "millions"),
    [("dit", 3584, 3, 1024, 63.9), ("dit", 4096, 3, 1024, 64.4), ("dit", 5120, 3, 1024, 65.5),
     ("dit", 3584, 8, 1280, 246), ("dit", 3584, 12, 1536, 523), ("vit", 3584, 3, 1024, 47.6),
     ("vit", 4096, 3, 1024, 48.5), ("vit", 5120, 3, 1024, 50.3)],
)  # fmt: skip
def test_heads_have_the_papers_number_of_parameters(name: str, d: int, depth: int, width: int, millions: float) -> None:  # fmt: skip
    with torch.device("meta"):
        head = make_head(name, d, 64, depth=depth)
    size = sum(p.numel() for p in head.parameters())
    assert size == expected_size(name, d, width, depth)
    assert round(size / 1e6, 1 if depth == 3 else 0) == millions
    if (name, depth) == ("dit", 3):
        assert round(sum(p.numel() for p in head.blocks[0].parameters()) / 1e6, 2) == 18.89
    assert head.blocks[0].attention.heads == 16 and not list(head.buffers())


@pytest.mark.parametrize(("name", "steps"), [("dit", 150), ("vit", 40)])
def test_1_and_8_silent_at_first_then_learning(name: str, steps: int) -> None:
    """Loss 1.0, no gradient into the hidden states; some within three steps; then below any blind guess."""
    views = Views.of([(4, 4)] * 6)
    condition = torch.randn(96, 32)
    z0 = F.layer_norm(condition, (32,))[:, :16]
    head = make_head(name, 32, 16, depth=1, width=64)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    losses, pulls = [], []
    for step in range(steps):
        hidden = condition.clone().requires_grad_()
        loss = rows(views, head, hidden, target=z0, draws=noise(views, 6, dim=16, seed=step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert hidden.grad is not None
        losses.append(float(loss))
        pulls.append(float(hidden.grad.abs().max()))
    assert losses[0] == pytest.approx(1.0, abs=0.02)
    assert pulls[0] == 0 and max(pulls[1:4]) > 0
    assert sum(losses[-10:]) / 10 < (0.3 if name == "dit" else ignoring_the_condition())


def test_the_learnt_positions_are_read_at_each_patchs_own_place() -> None:
    head: Any = make_head("vit", 8, 4, depth=1, width=64, position_grid=(3, 5))
    own = head.front(torch.zeros(15, 8), Views.of([(3, 5)]))
    assert torch.allclose(own, head.positions, atol=1e-6)
    coarse = head.front(torch.zeros(1, 8), Views.of([(1, 1)]))
    assert torch.allclose(coarse[0], head.positions[7], atol=1e-6)  # the middle of the picture
    fixed = positions_2d(torch.arange(27).repeat_interleave(27), torch.arange(27).repeat(27), 64)
    assert len(fixed.round(decimals=4).unique(dim=0)) == 729


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"name": "dti"}, "algorithms.ross.head: unknown head 'dti'; did you mean 'dit'"),
     ({"width": "scald"}, "algorithms.ross.width: 'scald': use a number, null (the paper's) or scaled"),
     ({"width": 200}, "algorithms.ross.width: 200 must be a multiple of 4 and of the 3 attention heads"),
     ({"width": 0}, "algorithms.ross.width: 0 "), ({"width": -64}, "algorithms.ross.width: -64 "),
     ({"name": "vit", "mlp_ratio": 0.0}, "algorithms.ross.mlp_ratio: 0.0 ")],
)  # fmt: skip
def test_wrong_sizes_are_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        make_head(**{"name": "dit", "condition": 8, "dim": 4, **arguments})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_scaled_widths_keep_the_papers_proportion() -> None:
    assert [scaled_width(d) for d in (3584, 4096, 576, 32)] == [1024, 1152, 192, 64]
    assert make_head("dit", 3584, 4, depth=1, width="scaled").width == 1024


def test_pictures_are_not_stretched_out_of_range_and_targets_without_a_decoder_say_so() -> None:
    target = PixelTarget(cell=2)
    found = target.moments([torch.rand(3, 9, 7), torch.ones(3, 4, 4)], [(3, 2), (2, 2)])
    assert found.shape == (10, 12) and float(found.abs().max()) <= 1 and bool((found[6:] == 1).all())
    with pytest.raises(UserError, match="PixelTarget: this target cannot be turned back"):
        Target.decode(target, found[None], (2, 5))
