"""Which patches show a part of a picture: boxes in the original picture against the grids of all its views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def patch_boxes(batch: dict[str, Any]) -> torch.Tensor:
    """Where each patch of a micro-batch lies in its original picture.

    Args:
        batch: of ``data.batch.split_batch``, on any device.

    Returns:
        (P, 4) float64: left, top, right, bottom in shares of the picture's width and height; beyond 0..1 where the
        processor padded the picture.
    """
    view = batch["patch_view"]
    left, top, right, bottom = batch["view_box"].double()[view].unbind(1)
    rows, columns = batch["view_grid"].double()[view].unbind(1)
    width, height = (right - left) / columns, (bottom - top) / rows
    x, y = left + batch["patch_column"] * width, top + batch["patch_row"] * height
    return torch.stack([x, y, x + width, y + height], 1)


def patch_rows(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of the batch that holds each patch, and its position in that row: two (P,) int64."""
    length = batch["input_ids"].shape[1]
    return batch["patch_position"] // length, batch["patch_position"] % length


def shares(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> torch.Tensor:
    """Boxes in pixels (left, top, right, bottom; the last two excluded) -> (N, 4) float64 shares of a picture.

    Args:
        size: (height, width) of the picture that the boxes are about.
    """
    scale = torch.tensor([size[1], size[0], size[1], size[0]], dtype=torch.float64)
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) / scale


def covered(patches: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Share of each patch's area that lies in each box: (N, P), 0..1, from (P, 4) patches and (N, 4) boxes."""
    left, top, right, bottom = patches.unbind(1)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    width = (torch.minimum(right, x1) - torch.maximum(left, x0)).clamp(min=0)
    height = (torch.minimum(bottom, y1) - torch.maximum(top, y0)).clamp(min=0)
    return width * height / ((right - left) * (bottom - top))


def overlap(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(N, 4) boxes that two boxes share; without area where they share nothing."""
    corner = torch.maximum(one[:, :2], other[:, :2])
    return torch.cat([corner, torch.maximum(torch.minimum(one[:, 2:], other[:, 2:]), corner)], 1)
