"""Which token shows what: the patch index of a batch, from its views.

Everything here runs on the CPU while the batch is still there (in ``split_batch``); its results travel to
the device as plain index tensors, so that no step waits for the device to learn a shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PatchIndex:
    """One entry a patch token, views one after the other, each in raster order. P patches in all.

    Attributes:
        position: (P,) int64, index into the flattened (B * L) tokens.
        view: (P,) int64, which view it belongs to.
        row, column: (P,) int64, its place in the view's grid.
    """

    position: torch.Tensor
    view: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor


def patch_index(
    view_row: torch.Tensor,
    view_start: torch.Tensor,
    view_stride: torch.Tensor,
    view_grid: torch.Tensor,
    length: int,
) -> PatchIndex:
    """List every patch token of a batch.

    Args:
        view_row: (V,) int64, the batch row that holds the view.
        view_start: (V,) int64, position in that row of the first patch.
        view_stride: (V,) int64, tokens from one row of patches to the next.
        view_grid: (V, 2) int64, rows and columns.
        length: L, tokens a batch row.
    """
    patches = view_grid[:, 0] * view_grid[:, 1]
    view = torch.repeat_interleave(torch.arange(len(patches)), patches)
    offset = torch.arange(len(view)) - torch.repeat_interleave(patches.cumsum(0) - patches, patches)
    columns = view_grid[view, 1]
    row, column = offset // columns, offset % columns
    position = view_row[view] * length + view_start[view] + row * view_stride[view] + column
    return PatchIndex(position, view, row, column)


def predictors(document_ids: torch.Tensor, branch_ids: torch.Tensor) -> torch.Tensor:
    """Position from which each token is predicted: (B, L) int64, -1 where nothing comes before it.

    That is the token before it, except at the start of a branch (an independent question about a shared
    picture), which is predicted from the end of the trunk; and the first token of a document has none.

    Args:
        document_ids: (B, L), -1 for padding.
        branch_ids: (B, L), 0 for the trunk.
    """
    batch, length = document_ids.shape
    place = torch.arange(length).expand(batch, length)
    trunk = torch.where((branch_ids == 0) & (document_ids >= 0), place, -1).cummax(dim=1).values
    before = place - 1
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = branch_ids[:, 1:] != branch_ids[:, :-1]
    source = torch.where(starts & (branch_ids > 0), trunk, before)
    same = document_ids.gather(1, source.clamp(min=0)) == document_ids
    return torch.where((source >= 0) & same & (document_ids >= 0), source, -1)
