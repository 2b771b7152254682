"""Which blocks of an image are hidden and which remain as context: I-JEPA's multi-block masks, for any grids.

Source: arXiv 2301.08243 section 3 with the hyper-parameters of JARVIS (arXiv 2512.15885). A view (one grid of
patches) gets K target blocks of one common size and one context block from which the targets are cut out. All views
of a batch are drawn at once, from keys, so that a mask is a function of its sample alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch

from ...models.errors import UserError, nearest
from ...models.randomness import keys, uniform

MOST_BLOCKS = 8
CONTEXT = 1 << MOST_BLOCKS
MASKED = 1 << (MOST_BLOCKS + 1)
BLOCKS = CONTEXT - 1
"""Code of a patch, int16: bit j: it lies in target block j; ``CONTEXT``; ``MASKED``: its view is masked at all."""

ATTEMPTS = 20
_SIZE, _CORNER = 0, 1
"""Streams of random numbers of one view."""

WHERE = "algorithms.jarvis.masks"


@dataclass(frozen=True)
class MaskConfig:
    """How masks are drawn; defaults are the paper's code unless said.

    Attributes:
        blocks: K, target blocks a view.
        scale: smallest and largest share of the grid that a target block covers.
        aspect: smallest and largest height / width of a target block.
        context_scale: of the (square) context block.
        min_keep: share of the grid that each target and the context must exceed (code: 10 of 576).
        size_scope: ``sample``: every view has block sizes of its own (ours); ``batch``: all views of a device batch
            share them (code).
        edge_fix: blocks may touch the last row and column (ours); the code's blocks never do.
        ctx_truncate: ``none`` (ours); ``batch_min``: every context is cut to the smallest of the device batch (on grids of
            its size), first patches in raster order first, so that the bottom of the images is dropped (code).
        tgt_overlap: target blocks may overlap; else a patch belongs to the first block that covers it.

    With ``size_scope: batch`` or ``ctx_truncate: batch_min`` a mask depends on what else is in the batch.
    """

    blocks: int = 4
    scale: tuple[float, float] = (0.15, 0.2)
    aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_keep: float = 10 / 576
    size_scope: str = "sample"
    edge_fix: bool = True
    ctx_truncate: str = "none"
    tgt_overlap: bool = True

    def __post_init__(self):
        if type(self.blocks) is not int or not 1 <= self.blocks <= MOST_BLOCKS:
            raise UserError(f"{WHERE}.blocks: {self.blocks}: use 1 to {MOST_BLOCKS}")
        for key, most in (("scale", 1.0), ("aspect", 100.0), ("context_scale", 1.0)):
            value = getattr(self, key)
            pair = isinstance(value, (list, tuple)) and len(value) == 2
            if not pair or not all(isinstance(v, (int, float)) for v in value):
                raise UserError(f"{WHERE}.{key}: {value}: use [smallest, largest]")
            if not 0 < value[0] <= value[1] <= most:
                raise UserError(f"{WHERE}.{key}: {list(value)}: use 0 < smallest <= largest <= {most:g}")
            object.__setattr__(self, key, (float(value[0]), float(value[1])))
        if not isinstance(self.min_keep, (int, float)) or not 0 <= self.min_keep < 1:
            raise UserError(
                f"{WHERE}.min_keep: {self.min_keep}: a share of the grid, 0 or more and less than 1"
            )
        for key, known in (("size_scope", ("sample", "batch")), ("ctx_truncate", ("none", "batch_min"))):
            if getattr(self, key) not in known:
                raise UserError(
                    f"{WHERE}.{key} '{getattr(self, key)}': unknown{nearest(str(getattr(self, key)), known)}"
                )
        for key in ("edge_fix", "tgt_overlap"):
            if not isinstance(getattr(self, key), bool):
                raise UserError(f"{WHERE}.{key}: {getattr(self, key)}: use true or false")


PRESETS = {
    "default": MaskConfig(),
    "parity": MaskConfig(size_scope="batch", edge_fix=False, ctx_truncate="batch_min"),
}
"""``parity``: the statistics of the authors' code."""

NONE = "none"
"""In place of a preset: nothing is hidden, every patch is predicted (unmasked alignment, a control)."""


def mask_config(spec: str | Mapping[str, Any]) -> MaskConfig | None:
    """Masks from a YAML: a preset's name, keywords on top of a preset (key ``preset``), or ``none`` (None).

    Raises:
        UserError: unknown preset or keyword, or a value out of range.
    """
    if not isinstance(spec, (str, Mapping)):
        raise UserError(f"{WHERE}: {spec}: use a preset's name or a mapping")
    given = {"preset": spec} if isinstance(spec, str) else dict(spec)
    preset = given.pop("preset", "default")
    if preset == NONE:
        if given:
            raise UserError(f"{WHERE}.{next(iter(given))}: nothing is hidden with the preset {NONE}")
        return None
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"{WHERE} '{preset}': unknown{nearest(str(preset), [*PRESETS, NONE])}")
    known = [f.name for f in fields(MaskConfig)]
    for key in given:
        if key not in known:
            raise UserError(f"{WHERE}.{key}: unknown key{nearest(str(key), known)}")
    base = {key: getattr(PRESETS[preset], key) for key in known}
    return MaskConfig(**{**base, **given})


@dataclass(frozen=True)
class Patches:
    """Patches of V views, one after the other, each in raster order; P in all.

    Attributes:
        grid: (V, 2) int64 rows and columns.
        view, row, column: (P,) int64.
    """

    grid: torch.Tensor
    view: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    @classmethod
    def of(cls, grid: torch.Tensor) -> Patches:
        """From the grids alone."""
        count = grid.prod(1)
        view = torch.repeat_interleave(torch.arange(len(grid)), count)
        offset = torch.arange(len(view)) - torch.repeat_interleave(count.cumsum(0) - count, count)
        columns = grid[view, 1]
        return cls(grid, view, offset // columns, offset % columns)

    def per_view(self, flags: torch.Tensor) -> torch.Tensor:
        """Sums (V, ...) of (P, ...) flags."""
        out = torch.zeros((len(self.grid), *flags.shape[1:]), dtype=torch.int64)
        return out.index_add_(0, self.view, flags.long())


def block_sizes(u: torch.Tensor, grid: torch.Tensor, config: MaskConfig) -> torch.Tensor:
    """Height and width of target and context blocks: (V, 2, 2) int64, [view, target or context, side].

    Args:
        u: (V, 2) float64 in [0, 1): one number fixes scale and aspect of the targets, the other those of the context.
        grid: (V, 2) int64.
        config: scales, aspects, edges.
    """
    low = torch.tensor([config.scale[0], config.context_scale[0]], dtype=torch.float64)
    high = torch.tensor([config.scale[1], config.context_scale[1]], dtype=torch.float64)
    area = (grid.prod(1)[:, None] * (low + u * (high - low))).floor()
    least = torch.tensor([config.aspect[0], 1.0], dtype=torch.float64)
    most = torch.tensor([config.aspect[1], 1.0], dtype=torch.float64)
    aspect = least + u * (most - least)
    sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=-1).round().long()
    return torch.minimum(sides, grid[:, None, :] - (0 if config.edge_fix else 1))


def _attempt(
    key: torch.Tensor, size_key: torch.Tensor, attempt: int, patches: Patches, config: MaskConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One draw for every view: code (P,) int16, and whether it is a mask (V,) bool."""
    grid, blocks = patches.grid, config.blocks
    # A size that all views share is never drawn again: it belongs to the batch.
    again = attempt if config.size_scope == "sample" else 0
    size = block_sizes(uniform(keys(size_key, _SIZE, again), 2), grid, config)
    sides = torch.cat(
        [size[:, :1].expand(-1, blocks, -1), size[:, 1:]], dim=1
    )  # (V, K + 1, 2), the context last
    places = (grid[:, None, :] - sides + (1 if config.edge_fix else 0)).clamp(min=1)
    u = uniform(keys(key, _CORNER, attempt), 2 * (blocks + 1)).view(-1, blocks + 1, 2)
    corner = (u * places).long()
    # A block is a product of a span of rows and a span of columns, so that bits of all blocks meet in one "and".
    rows, columns = (_bits_along(corner[..., side], sides[..., side], grid[:, side]) for side in (0, 1))
    inside = (
        rows[patches.view, patches.row] & columns[patches.view, patches.column]
    )  # the context's bit is the last
    bits = inside & (1 << blocks) - 1
    if not config.tgt_overlap:
        bits = bits & -bits  # the lowest set bit
    context = (inside >> blocks).bool() & (bits == 0)
    sizes = sides.prod(-1)  # what lies in a block, but where others cut it
    sizes[:, blocks] = patches.per_view(context)
    if not config.tgt_overlap:
        sizes[:, :blocks] = patches.per_view((bits[:, None] >> torch.arange(blocks)) & 1)
    enough = sizes > config.min_keep * grid.prod(1).double()[:, None]
    masked = enough.all(1) & (size[:, 0] >= 2).all(1)  # a line of patches is no block
    return (bits + CONTEXT * context).short(), masked


def _bits_along(first: torch.Tensor, length: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which spans cover each place along one side: (V, longest side) int64, bit j for span j.

    Args:
        first, length: (V, n) int64, of each span.
        count: (V,) int64, places along the side of each view's grid.
    """
    at = torch.arange(int(count.max()) if len(count) else 0)
    from_first = at[:, None] - first[:, None]  # (V, side, n)
    covered = (from_first >= 0) & (from_first < length[:, None])
    return (covered.long() << torch.arange(first.shape[1])).sum(-1)


def sample_masks(
    key: torch.Tensor, grid: torch.Tensor, config: MaskConfig, batch_key: torch.Tensor | None = None
) -> torch.Tensor:
    """Masks of V views: codes of their P patches, (P,) int16; 0 throughout a view that no mask fits on.

    Args:
        key: (V,) int64, a view's own (``models.randomness.keys_of_views``).
        grid: (V, 2) int64 rows and columns.
        config: see :class:`MaskConfig`.
        batch_key: scalar int64, of the batch, for ``size_scope: batch``.
    """
    if config.size_scope == "batch":
        assert batch_key is not None, "size_scope 'batch' needs a key of the batch"
    size_key = key if config.size_scope == "sample" else batch_key.expand(len(grid))  # type: ignore[union-attr]
    patches = Patches.of(grid)
    code, masked = _attempt(key, size_key, 0, patches, config)
    for attempt in range(1, ATTEMPTS):
        failed = ~masked
        if not bool(failed.any()):
            break
        again, good = _attempt(key[failed], size_key[failed], attempt, Patches.of(grid[failed]), config)
        code[failed[patches.view]] = again
        masked = masked.masked_scatter(failed, good)
    code = torch.where(masked[patches.view], code + MASKED, 0).short()
    return _truncated(code, masked, patches) if config.ctx_truncate == "batch_min" else code


def _truncated(code: torch.Tensor, masked: torch.Tensor, patches: Patches) -> torch.Tensor:
    """Every context cut to the smallest one's number of patches on that grid, the first in raster order kept."""
    context = (code & CONTEXT) != 0
    if not bool(masked.any()):
        return code
    counts = patches.per_view(context)
    # Among views of one grid: of a large and a small picture, the large one would be left next to nothing.
    alike = torch.unique(patches.grid, dim=0, return_inverse=True)[1]
    of_masked = torch.where(masked, counts, torch.iinfo(counts.dtype).max)
    least = torch.full_like(counts, torch.iinfo(counts.dtype).max).scatter_reduce_(
        0, alike, of_masked, "amin"
    )
    before = (counts.cumsum(0) - counts)[patches.view]
    kept = context & (context.cumsum(0) - before <= least[alike][patches.view])
    return torch.where(context & ~kept, code & ~CONTEXT, code)


@lru_cache(256)
def fits(rows: int, columns: int, config: MaskConfig) -> bool:
    """Whether masks can be drawn on a grid: 256 fixed draws succeed, but for one in a hundred."""
    count = 256
    key = keys(rows, columns, torch.arange(count))
    grid = torch.tensor([[rows, columns]]).expand(count, 2)
    one_by_one = MaskConfig(**{**vars(config), "size_scope": "sample", "ctx_truncate": "none"})
    code = sample_masks(key, grid, one_by_one)
    return int((code.view(count, -1)[:, 0] != 0).sum()) >= 0.99 * count
