"""Patches of several views in one flat list, and attention within each view.

Everything a denoiser does token by token runs on the flat list (nothing is computed for padding); only attention
needs the tokens of a view side by side. Views are gathered into buckets of similar size, which the host knows from
the grids: no step waits for the device to learn a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.nn import functional as F

WASTE = 0.75
"""Smallest share of a bucket's width that a view may fill; so there are few buckets, whatever the pictures are."""


@dataclass(frozen=True)
class Bucket:
    """Views whose attention is computed together.

    Attributes:
        index: (v, n) int64, flat patch of each view's tokens; padding repeats the view's first patch.
        real: (v, n) bool, False for padding; None where all views have n patches.
        whole: the bucket is the flat list itself (one grid size in all): a reshape, no gather.
    """

    index: torch.Tensor
    real: torch.Tensor | None
    whole: bool


@dataclass(frozen=True)
class Views:
    """Where the P patches of V views lie.

    Attributes:
        view, row, column: (P,) int64: the view of each patch and its place in the grid.
        extent: (P, 2) int64: rows and columns of that grid.
        buckets: see :class:`Bucket`.
        visible: (P,) bool, patches that may be attended to; None: all.
    """

    view: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    extent: torch.Tensor
    buckets: tuple[Bucket, ...]
    visible: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        grids: Sequence[tuple[int, int]],
        device: torch.device | None = None,
        visible: torch.Tensor | None = None,
    ) -> Views:
        """From the (rows, columns) of each view, in order.

        What lies on the device is kept for the next micro-batch with the same grids.
        """
        known = _laid_out(tuple((int(r), int(c)) for r, c in grids), device)
        return known if visible is None else replace(known, visible=visible)

    @classmethod
    def _made(cls, grids: tuple[tuple[int, int], ...], device: torch.device | None) -> Views:
        sizes = torch.tensor([r * c for r, c in grids], dtype=torch.int64)
        columns = torch.tensor([c for _, c in grids], dtype=torch.int64)
        view = torch.repeat_interleave(torch.arange(len(grids)), sizes)
        offset = torch.arange(len(view)) - (sizes.cumsum(0) - sizes)[view]
        row, column = offset // columns[view], offset % columns[view]
        buckets = tuple(
            Bucket(
                b.index.to(device, non_blocking=True),
                None if b.real is None else b.real.to(device, non_blocking=True),
                b.whole,
            )
            for b in _buckets(sizes)
        )
        extent = torch.tensor(grids, dtype=torch.int64).view(-1, 2)[view]
        return cls(
            view.to(device, non_blocking=True),
            row.to(device, non_blocking=True),
            column.to(device, non_blocking=True),
            extent.to(device, non_blocking=True),
            buckets,
        )

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Full attention among the visible patches of each view.

        Args:
            q, k, v: (K, P, heads, width) for K copies of the patches.

        Returns:
            (K, P, heads, width). A view without any visible patch attends to all of its own (nobody reads it).
        """
        if len(self.buckets) == 1 and self.buckets[0].whole:
            return self._bucket(self.buckets[0], q, k, v).reshape(q.shape)
        out = torch.zeros_like(q)
        for bucket in self.buckets:
            attended = self._bucket(bucket, q, k, v)
            if bucket.real is None:
                out = out.index_copy(1, bucket.index.flatten(), attended.flatten(1, 2))
            else:
                # Which entries are real is known on the host as an index, not found on the device.
                real = torch.where(bucket.real, bucket.index, q.shape[1])
                padded = F.pad(out, (0, 0, 0, 0, 0, 1))
                out = padded.index_copy(1, real.flatten(), attended.flatten(1, 2))[:, :-1]
        return out

    def _bucket(self, bucket: Bucket, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        count, width = bucket.index.shape

        def gathered(x: torch.Tensor) -> torch.Tensor:
            tokens = (
                x.unflatten(1, (count, width))
                if bucket.whole
                else x[:, bucket.index.flatten()].unflatten(1, (count, width))
            )
            return tokens.flatten(0, 1).transpose(1, 2)  # (K * v, heads, n, width)

        mask = bucket.real
        if self.visible is not None:
            seen = self.visible[bucket.index]
            mask = seen if mask is None else mask & seen
            own = torch.ones_like(seen) if bucket.real is None else bucket.real
            mask = torch.where(mask.any(1, keepdim=True), mask, own)
        if mask is not None:
            mask = mask[None, :, None, None, :].expand(q.shape[0], -1, -1, -1, -1).flatten(0, 1)
        attended = F.scaled_dot_product_attention(gathered(q), gathered(k), gathered(v), attn_mask=mask)
        return attended.transpose(1, 2).unflatten(0, (q.shape[0], count))


@lru_cache(64)
def _laid_out(grids: tuple[tuple[int, int], ...], device: torch.device | None) -> Views:
    return Views._made(grids, device)


def _buckets(sizes: torch.Tensor) -> list[Bucket]:
    """Views by size, largest first; a bucket takes views of at least ``WASTE`` of its largest."""
    count = sizes.tolist()
    starts = (sizes.cumsum(0) - sizes).tolist()
    if len(set(count)) == 1:
        index = torch.arange(int(sizes.sum())).view(len(count), count[0])
        return [Bucket(index, None, whole=True)]
    order = sorted(range(len(count)), key=lambda i: (-count[i], i))
    groups: list[list[int]] = []
    for i in order:
        if not groups or count[i] < WASTE * count[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    buckets = []
    for group in groups:
        width = count[group[0]]
        place = torch.arange(width)
        own = sizes[group][:, None]
        first = torch.tensor([starts[i] for i in group])[:, None]
        real = place[None] < own
        index = first + torch.where(real, place[None], 0)
        buckets.append(Bucket(index, None if bool(real.all()) else real, whole=False))
    return buckets
