"""JARVIS's masks: the reference's statistics, a loop over blocks that gives the same codes, and what a mask depends on."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.jarvis import sampler as sampler_module
from opsin.algorithms.jarvis.cut import CODE
from opsin.algorithms.jarvis.sampler import (
    ATTEMPTS,
    BLOCKS,
    CONTEXT,
    MASKED,
    MOST_BLOCKS,
    PRESETS,
    MaskConfig,
    block_sizes,
    fits,
    mask_config,
    sample_masks,
)
from opsin.models.errors import UserError
from opsin.models.randomness import keys, uniform

import zoo
from methods import Bench, teacher

# Of the reference, 24 x 24 patches (fact sheet, section 2).
TARGET_SIZES = {(8, 10): 0.03, (8, 11): 0.06, (9, 10): 0.19, (10, 9): 0.01, (10, 10): 0.18, (11, 9): 0.20,
                (11, 10): 0.01, (12, 9): 0.20, (13, 9): 0.12}  # fmt: skip
CONTEXT_SIZES = {(23, 23): 0.80, (22, 22): 0.20}


def count(bits: torch.Tensor) -> torch.Tensor:
    return sum(((bits >> j) & 1).long() for j in range(MOST_BLOCKS))  # type: ignore[return-value]


def grids(*sides: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(sides)


def on_grid(side: int, views: int, config: MaskConfig, seed: int = 1) -> torch.Tensor:
    """(views, side, side) codes."""
    key = keys(seed, torch.arange(views))
    return sample_masks(key, grids((side, side)).expand(views, 2), config, keys(9, seed)).view(
        views, side, side
    )


# The reference's statistics ------------------------------------------------------------------------------------


def test_parity_sizes_have_the_references_histogram() -> None:
    views = 20_000
    size = block_sizes(
        uniform(keys(1, torch.arange(views)), 2), grids((24, 24)).expand(views, 2), PRESETS["parity"]
    )
    for which, golden in enumerate((TARGET_SIZES, CONTEXT_SIZES)):
        seen, times = size[:, which].unique(dim=0, return_counts=True)
        share = {tuple(s): n / views for s, n in zip(seen.tolist(), times.tolist(), strict=True)}
        assert share.keys() == golden.keys()
        for one, p in golden.items():  # golden values have two digits; four standard errors
            assert abs(share[one] - p) < 0.005 + 4 * math.sqrt(max(p, 0.01) / views), (one, share[one])


@pytest.mark.parametrize(
    ("together", "context", "unused"), [(1, 0.46, 0.10), (4, 0.38, 0.16), (16, 0.34, 0.21)]
)
def test_parity_masks_have_the_references_statistics(together: int, context: float, unused: float) -> None:
    batches = {1: 160, 4: 60, 16: 30}[together]
    told = []
    for seed in range(batches):
        code = on_grid(24, together, PRESETS["parity"], seed).flatten(1)
        bits, seen = code & BLOCKS, (code & CONTEXT) != 0
        union = (bits != 0).float().mean(1)
        shared = (count(bits) > 1).sum(1) / (bits != 0).sum(1)
        told.append(
            torch.stack([union, shared, seen.float().mean(1), (~seen & (bits == 0)).float().mean(1)], 1)
        )
    # One size a batch: batches are what is independent.
    means = torch.stack([t.mean(0) for t in told])
    error = 4 * means.std(0) / batches**0.5
    off = (means.mean(0) - torch.tensor([0.45, 0.42, context, unused])).abs()
    assert bool((off < 0.01 + error).all()), (means.mean(0), error)
    assert bool((error < 0.05).all())


def test_batch_min_gives_one_context_size_and_drops_the_bottom() -> None:
    code = on_grid(24, 64, PRESETS["parity"])
    seen = (code & CONTEXT) != 0
    assert len(seen.flatten(1).sum(1).unique()) == 1
    rows = seen.float().mean((0, 2))
    assert float(rows[2]) > 0.3 > 0.1 > float(rows[21])
    whole = on_grid(24, 64, replace(PRESETS["parity"], ctx_truncate="none"))
    assert float(((whole & CONTEXT) != 0).float().mean((0, 2))[21]) > 0.3


# A loop --------------------------------------------------------------------------------------------------------


def naive_view(key: torch.Tensor, size_key: torch.Tensor, grid: tuple[int, int], c: MaskConfig) -> list[int]:
    """Code of each patch of one view, by sections 1.4 and 2 of the sheet; zeros where nothing fits."""
    rows, columns = grid
    for attempt in range(ATTEMPTS):
        u = uniform(keys(size_key, 0, attempt if c.size_scope == "sample" else 0), 2).tolist()
        corners = uniform(keys(key, 1, attempt), 2 * (c.blocks + 1)).tolist()
        sides = []
        for share, scale, aspect in ((u[0], c.scale, c.aspect), (u[1], c.context_scale, (1.0, 1.0))):
            area = math.floor(rows * columns * (scale[0] + share * (scale[1] - scale[0])))
            ratio = aspect[0] + share * (aspect[1] - aspect[0])
            most = (rows, columns) if c.edge_fix else (rows - 1, columns - 1)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            sides.append((min(height, most[0]), min(width, most[1])))
        if min(sides[0]) < 2:
            continue
        code = [0] * (rows * columns)
        sizes = []
        for j in range(c.blocks + 1):
            height, width = sides[0] if j < c.blocks else sides[1]
            free = 1 if c.edge_fix else 0
            top = int(corners[2 * j] * max(rows - height + free, 1))
            left = int(corners[2 * j + 1] * max(columns - width + free, 1))
            size = 0
            for r in range(top, min(top + height, rows)):
                for q in range(left, min(left + width, columns)):
                    at = r * columns + q
                    taken = code[at] & BLOCKS
                    if taken and (j == c.blocks or not c.tgt_overlap):
                        continue
                    code[at] |= CONTEXT if j == c.blocks else 1 << j
                    size += 1
            sizes.append(size)
        if all(size > c.min_keep * rows * columns for size in sizes):
            return [value + MASKED for value in code]
    return [0] * (rows * columns)


def naive_cut(views: list[list[int]]) -> list[list[int]]:
    """Contexts of masked views cut to the smallest one's size, in raster order."""
    sizes = [sum(bool(v & CONTEXT) for v in view) for view in views if view[0] & MASKED]
    for view in views:
        kept = 0
        for i, value in enumerate(view):
            if value & CONTEXT:
                kept += 1
                view[i] = value if kept <= min(sizes) else value - CONTEXT
    return views


side = st.integers(1, 12)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.lists(st.tuples(side, side), min_size=1, max_size=5),
    st.integers(1, 5),
    st.tuples(st.floats(0.05, 0.5), st.floats(0, 0.3)),
    st.sampled_from([(0.75, 1.5), (0.3, 3.0), (1.0, 1.0)]),
    st.sampled_from([0.0, 10 / 576, 0.1]),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    st.integers(0, 1000),
)
def test_a_loop_over_views_and_blocks_gives_the_same_codes(
    found: list[tuple[int, int]], blocks: int, scale: tuple, aspect: tuple, keep: float, flags: tuple, seed: int
) -> None:  # fmt: skip
    c = MaskConfig(
        blocks, (scale[0], scale[0] + scale[1]), aspect, (0.6, 1.0), keep, ["sample", "batch"][flags[0]], flags[1],
        ["none", "batch_min"][flags[2]], flags[3],
    )  # fmt: skip
    key, batch_key = keys(seed, torch.arange(len(found))), keys(7, seed)
    views = [naive_view(k, batch_key if flags[0] else k, g, c) for k, g in zip(key, found, strict=True)]
    if flags[2]:
        views = naive_cut(views)
    assert sample_masks(key, grids(*found), c, batch_key).tolist() == [v for view in views for v in view]


# Properties ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edge_fix", [False, True])
def test_the_last_row_and_column_are_reached_with_edge_fix_alone(edge_fix: bool) -> None:
    code = on_grid(24, 600, replace(PRESETS["default"], edge_fix=edge_fix))
    target, context = ((code & BLOCKS) != 0).any(0), ((code & CONTEXT) != 0).any(0)
    for reached in (target, context):
        assert bool(reached[:23, :23].all())
        assert bool(reached[23].all() and reached[:, 23].all()) == edge_fix
        assert bool(reached[23].any() or reached[:, 23].any()) == edge_fix


@pytest.mark.parametrize("side", [8, 13, 24])
@pytest.mark.parametrize("changes", [{}, {"tgt_overlap": False}, {"min_keep": 0.1}, {"blocks": MOST_BLOCKS}])
def test_targets_and_context_are_disjoint_and_larger_than_min_keep(side: int, changes: dict) -> None:
    config = replace(PRESETS["default"], **changes)
    code = on_grid(side, 100, config).flatten(1)
    masked = (code[:, 0] & MASKED) != 0
    if not changes:
        assert bool(masked.all())
    code = code[masked]
    bits, context = code & BLOCKS, (code & CONTEXT) != 0
    assert bool(((code & MASKED) != 0).all()) and not bool((context & (bits != 0)).any())
    sizes = torch.stack([((bits >> j) & 1).sum(1) for j in range(config.blocks)])
    least = config.min_keep * side * side
    assert bool((sizes > least).all()) and bool((context.sum(1) > least).all())
    if not config.tgt_overlap:
        assert int(count(bits).max()) == 1
    assert bool((bits < 1 << config.blocks).all())


def test_small_grids_take_several_attempts_and_those_that_fail_are_left_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """6 x 6: most first draws leave too little context, yet later ones fit."""
    config = replace(PRESETS["default"], min_keep=0.12)
    tries = []
    stock = sampler_module._attempt
    monkeypatch.setattr(
        sampler_module, "_attempt", lambda k, s, a, p, c: tries.append((a, len(k))) or stock(k, s, a, p, c)
    )
    code = on_grid(6, 200, config).flatten(1)
    assert tries[0] == (0, 200) and len(tries) > 3
    left = [n for _, n in tries]
    assert left == sorted(left, reverse=True) and left[1] > 10
    masked = code[:, 0] != 0
    assert int(masked.sum()) > 200 - left[1]
    for view in code:
        assert bool((view == 0).all()) or bool(((view & MASKED) != 0).all())
    alone = torch.stack([sample_masks(k[None], grids((6, 6)), config) for k in keys(1, torch.arange(200))])
    assert torch.equal(alone, code)


def test_grids_of_all_shapes_in_one_batch_and_those_too_small_are_whole() -> None:
    found = [(8, 8), (1, 9), (3, 3), (12, 5), (2, 2), (24, 24), (4, 4), (9, 1)]
    key = keys(1, torch.arange(len(found)))
    code = sample_masks(key, grids(*found), PRESETS["default"])
    start = 0
    for i, (rows, columns) in enumerate(found):
        own = code[start : start + rows * columns]
        assert bool(((own & MASKED) != 0).all()) == (min(rows, columns) > 4) == bool((own != 0).any())
        assert torch.equal(own, sample_masks(key[i : i + 1], grids((rows, columns)), PRESETS["default"]))
        start += rows * columns
    assert len(sample_masks(key[:0], torch.zeros(0, 2, dtype=torch.int64), PRESETS["parity"], keys(1))) == 0
    assert not fits(4, 4, PRESETS["default"]) and fits(8, 8, PRESETS["default"])
    assert fits(8, 8, PRESETS["parity"]) and not fits(4, 4, PRESETS["parity"])


# In batches ----------------------------------------------------------------------------------------------------


def drill(family: str = "llava", **arguments: Any) -> Bench:
    arguments = {"target": teacher(), "ntp_probability": 0.0, **arguments}
    return Bench(JARVIS(**arguments), family, size=32, bidirectional=True, max_seq_len=3000)


def told(
    bench: Bench, samples: list[dict], size: int | None = None, **options: Any
) -> dict[tuple, list[int]]:
    """Codes of each view by (sample, visit, image, view)."""
    found: dict[tuple, list[int]] = {}
    for part in bench.parts(bench.batch(samples, **options), size):
        for v in range(len(part["view_row"])):
            row, document = int(part["view_row"][v]), int(part["view_document"][v])
            who = (int(part["document_uid"][row, document]), int(part["document_visit"][row, document]), int(part["view_image"][v]))  # fmt: skip
            nth = sum(k[:3] == who for k in found)
            found[(*who, nth)] = part[CODE][part["patch_view"] == v].tolist()
    return found


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_mask_is_a_function_of_sample_visit_image_and_view_alone(family: str) -> None:
    bench = drill(family)
    samples = [zoo.sample(i, images=i % 3, size=[(40, 34), (64, 30)][i % 2]) for i in range(6)]
    masks = told(bench, samples)
    assert len({tuple(m) for m in masks.values()}) == len(masks) >= 6
    mixed = random.Random(1).sample(samples, 6)
    for other in (
        told(bench, samples, 1),
        told(bench, mixed, 2, padding_side="left"),
        told(bench, mixed, packing=True),
        told(bench, samples[:2]) | told(bench, samples[2:4]) | told(bench, samples[4:]),  # as ranks would
    ):
        assert other == masks
    again = told(bench, [{**s, "visit": 1} for s in samples])
    assert not {k: v for (a, _, *b), v in again.items() if v == masks[(k := (a, 0, *b))]}
    bench.state.rank_zero_seed = 4
    bench._tell("init")
    assert not [k for k, v in told(bench, samples).items() if v == masks[k]]


def test_a_grid_without_room_is_refused_at_init_in_one_line() -> None:
    with pytest.raises(UserError, match=r"algorithms.jarvis.masks: no blocks fit on 4x4 patches") as error:
        Bench(JARVIS(target=teacher()), "llava", size=16)
    assert "\n" not in str(error.value)
    Bench(JARVIS(target=teacher(), masks="none"), "llava", size=16)
    Bench(JARVIS(target=teacher()), "llava", size=32)


def test_views_too_small_are_left_whole_counted_and_the_others_are_masked() -> None:
    """Qwen2.5-VL: a strip of one row of patches beside a picture with room."""
    bench = drill("qwen2_5_vl", log_interval=1)
    samples = [zoo.sample(1, size=(300, 8)), zoo.sample(2, size=(64, 64)), zoo.sample(3, images=0)]
    batch = bench.batch(samples)
    assert batch["view_grid"].tolist()[0][0] == 1 and batch["view_grid"].tolist()[1] == [8, 8]
    loss, _ = bench.step(batch)
    assert math.isfinite(loss) and loss != 0
    alone, _ = bench.step(bench.batch([samples[1]]))
    assert loss == pytest.approx(alone, abs=1e-5)
    bench.state.timestamp.batch = 10
    bench._tell("batch_end")
    logged = bench.logger.log_metrics.call_args.args[0]
    assert (logged["jarvis/views_masked"], logged["jarvis/views_too_small"]) == (2, 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [("defalt", "masks 'defalt': unknown; did you mean 'default'"), ({"preset": "party"}, "masks 'party': unknown; did you mean 'parity'"),
     ({"block": 3}, "masks.block: unknown key; did you mean 'blocks'"), ({"blocks": 0}, "masks.blocks: 0: use 1 to 8"),
     ({"blocks": 13}, "masks.blocks: 13"), ({"blocks": True}, "masks.blocks: True"), ({"scale": [0.3, 0.2]}, "masks.scale: [0.3, 0.2]"),
     ({"scale": 0.2}, "masks.scale: 0.2"), ({"scale": [0.1, float("nan")]}, "masks.scale"), ({"aspect": [0, 1]}, "masks.aspect"),
     ({"min_keep": 10}, "masks.min_keep: 10: a share"), ({"min_keep": "x"}, "masks.min_keep: x"), ({"min_keep": float("nan")}, "masks.min_keep: nan"),
     ({"edge_fix": 1}, "masks.edge_fix: 1"), ({"size_scope": "sampel"}, "masks.size_scope 'sampel': unknown; did you mean 'sample'"),
     ({"size_scope": ["sample"]}, "masks.size_scope"), ({"preset": ["parity"]}, "masks"), (["parity"], "masks: ['parity']"),
     (None, "masks: None"), ({"preset": "none", "blocks": 2}, "masks.blocks: nothing is hidden")],
)  # fmt: skip
def test_wrong_masks_are_one_line(spec: Any, message: str) -> None:
    assert mask_config("none") is mask_config({"preset": "none"}) is None
    with pytest.raises(UserError) as error:
        mask_config(spec)
    assert str(error.value).startswith(f"algorithms.jarvis.{message}") and "\n" not in str(error.value)
