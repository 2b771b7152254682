"""Strips of pictures to look at: rows of views, titled columns of what a method makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

GAP, LABEL = 4, 16
"""Pixels between pictures of a strip; height of its column titles."""


def strip(columns: Mapping[str, Sequence[torch.Tensor]], side: int = 128) -> Image.Image:
    """One row a view, one titled column a kind of picture.

    Args:
        columns: title -> pictures (3, h, w) in [0, 1], as many in each.
        side: pixels of the longer side as shown.
    """
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    heights = [max(round(side * p.shape[1] / max(p.shape[1:])) for p in row) for row in rows]
    sheet = Image.new(
        "RGB",
        (len(columns) * (side + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1) + LABEL),
        (250, 250, 248),
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for c, title in enumerate(columns):
        draw.text((GAP + c * (side + GAP), 2), title, fill=(40, 40, 40), font=font)
    top = LABEL + GAP
    for row, height in zip(rows, heights, strict=True):
        for c, picture in enumerate(row):
            scale = side / max(picture.shape[1:])
            shown = Image.fromarray(as_array(picture)).resize(
                (round(picture.shape[2] * scale), round(picture.shape[1] * scale)), Image.Resampling.NEAREST
            )
            sheet.paste(shown, (GAP + c * (side + GAP), top))
        top += height + GAP
    return sheet


def as_array(picture: torch.Tensor) -> np.ndarray:
    """(3, h, w) in [0, 1] -> (h, w, 3) uint8."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
