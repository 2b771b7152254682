"""LLaVA-OneVision: tiles of any resolution as in LLaVA-NeXT; the mosaic of a large picture is shrunk to a budget.

Each picture is cut into tiles, also where a sample has several: what the stock processor makes of a flat list of
pictures, and the model of a batch that does not say which pictures belong together.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..anatomy import Anatomy, Pictures, register_family
from .llava_next import LlavaNextImages, mosaic_pictures, smallest_mosaic

_WORTH_IT = 1.1
"""A mosaic is shrunk where its sides are longer than the budget allows by this factor."""


def shrunk(rows: int, columns: int, side: int, tiles: int) -> tuple[int, int]:
    """Tokens of a mosaic of ``rows`` x ``columns`` patches where ``tiles`` tiles' worth of tokens is the budget."""
    ratio = math.sqrt(rows * columns / (tiles * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > _WORTH_IT else (rows, columns)


def budget(config: Any) -> int:
    """Tiles' worth of tokens that a mosaic may have: N of ``vision_aspect_ratio: anyres_max_N``."""
    return int(str(config.vision_aspect_ratio).removeprefix("anyres_max_"))


class LlavaOnevisionImages(LlavaNextImages):
    """Tokens of a picture: the thumbnail's grid, then the mosaic (shrunk if large), a newline token each row.

    A picture so long and thin that its mosaic has no row or no column is a ``ValueError``.
    """

    def shown(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens that the model makes of so many of patches."""
        found = shrunk(rows, columns, self.side, budget(self.config))
        if not all(found):
            raise ValueError(f"{rows}x{columns} patches are so long and thin that none is left when shrunk")
        return found


def onevision_pictures(config: Any, batch: dict[str, torch.Tensor], processor: Any) -> Pictures:
    """Thumbnail and mosaic of each picture, the latter at the resolution of its tokens."""
    patch = int(config.vision_config.patch_size)
    side = batch["pixel_values"].shape[-1] // patch
    views: Pictures = []
    for number, view in enumerate(mosaic_pictures(config, batch, processor)):
        grid = view.shape[1] // patch, view.shape[2] // patch
        tokens = shrunk(*grid, side, budget(config)) if number % 2 else grid
        if tokens != grid:
            size = [tokens[0] * patch, tokens[1] * patch]
            view = F.interpolate(view[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
        views.append(view)
    return views


@register_family("llava_onevision", images=LlavaOnevisionImages)
def llava_onevision(hf: Any) -> Anatomy:
    """Anatomy of ``LlavaOnevisionForConditionalGeneration``."""
    return Anatomy(
        family="llava_onevision",
        vision_tower=("model.vision_tower",),
        projector=("model.multi_modal_projector", "model.image_newline"),
        language_model="model.language_model",
        lm_head="lm_head",
        pictures=partial(onevision_pictures, hf.config),
        dummy=smallest_mosaic,
    )
