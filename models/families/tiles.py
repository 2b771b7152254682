"""Families that cut a picture into square tiles, each a view of its own: its tokens follow one another.

Unlike LLaVA-NeXT's mosaic, neighbouring patches of two tiles are far apart among the tokens, so that no one grid
describes the whole picture.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..anatomy import Anatomy, Pictures, unnormalise
from ..geometry import PIXEL_KEY, View

Box = tuple[float, float, float, float]


def tile_boxes(rows: int, columns: int, seen: float = 1.0) -> list[Box]:
    """Where each tile of a picture cut into ``rows`` x ``columns`` lies, row by row, in shares of the picture.

    ``seen``: share of a tile's side that its patches cover (what is left over at its end belongs to none).
    """
    return [
        (c / columns, r / rows, (c + seen) / columns, (r + seen) / rows)
        for r in range(rows)
        for c in range(columns)
    ]


def tile_view(side: int, box: Box, start: int) -> View:
    """The view of a tile of ``side`` x ``side`` tokens."""
    return View((side, side), box, start=start, stride=side)


def tile_pictures(span: int, batch: dict[str, torch.Tensor], processor: Any) -> Pictures:
    """Each tile as the tower saw it: (3, rows * span, columns * span) in [0, 1]; a token shows ``span`` pixels a side."""
    pixels = batch[PIXEL_KEY]
    pixels = unnormalise(pixels.flatten(0, -4), processor.image_processor)
    rows, columns = pixels.shape[-2] // span, pixels.shape[-1] // span
    return list(pixels[..., : rows * span, : columns * span].unbind(0))


def tiled_anatomy(hf: Any, side: int, span: int, *, nested: bool = False, **paths: Any) -> Anatomy:
    """Anatomy of a family of tiles.

    Args:
        side: pixels along a tile.
        span: pixels along what one token shows.
        nested: tiles are (n, 1, 3, H, W) rather than (n, 3, H, W).
        paths: further fields of :class:`Anatomy`.
    """

    def dummy(hf: Any, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        # Not of zeros, which some families take for padding.
        shape = (1, 1, 3, side, side) if nested else (1, 3, side, side)
        return {PIXEL_KEY: torch.ones(shape, device=device, dtype=dtype)}

    return Anatomy(
        family=hf.config.model_type,
        lm_head="lm_head",
        pictures=partial(tile_pictures, span),
        dummy=dummy,
        **paths,
    )
