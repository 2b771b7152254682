"""LLaVA-NeXT (any resolution): a thumbnail, then a mosaic of tiles cropped to the picture, newline tokens."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from ..anatomy import Anatomy, Pictures, register_family, unnormalise
from ..geometry import PIXEL_KEY, EncodedImage, ImageEncoder, View, process_picture


def mosaic(size: tuple[int, int], pinpoints: list[Any], tile: int, side: int) -> tuple[int, int, int, int]:
    """Patches of the tile mosaic that show the picture, the letterbox cut off as the model cuts it.

    Args:
        size: (height, width) of the original picture.
        pinpoints: ``image_grid_pinpoints`` of the configuration, (height, width) each.
        tile: side of a tile in pixels.
        side: patches along a tile's side.

    Returns:
        rows, columns of the whole mosaic and the patches cut off at the top and at the left.
    """
    tile_rows, tile_columns = get_anyres_image_grid_shape(tuple(size), pinpoints, tile)
    rows, columns = tile_rows * side, tile_columns * side
    height, width = size
    if width / height > columns / rows:
        return rows, columns, (rows - int(round(height * columns / width, 7))) // 2, 0
    return rows, columns, 0, (columns - int(round(width * rows / height, 7))) // 2


class LlavaNextImages(ImageEncoder):
    """Tokens of a picture: the thumbnail's grid, then the mosaic row by row with a newline token each.

    A picture so long and thin that its mosaic has no row or no column is a ``ValueError``.
    """

    def __init__(self, processor: Any, config: Any):
        super().__init__(processor, config)
        self.tile = int(config.vision_config.image_size)
        self.patch = int(config.vision_config.patch_size)
        self.side = self.tile // self.patch

    def shown(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens that the model makes of so many of patches."""
        return rows, columns

    def encode(self, picture: Image.Image) -> EncodedImage:
        """One RGB picture -> ``pixel_values`` (1, 1 + tiles, 3, H, W), ``image_sizes`` (1, 2), two views."""
        out = process_picture(self.processor, picture)
        size = (picture.height, picture.width)
        rows, columns, top, left = mosaic(size, list(self.config.image_grid_pinpoints), self.tile, self.side)
        if rows <= 2 * top or columns <= 2 * left:
            raise ValueError(
                f"{size[1]}x{size[0]} pixels is so long and thin that no patch of the tiles shows it"
            )
        shown_rows, shown_columns = self.shown(rows - 2 * top, columns - 2 * left)
        base = self.side * self.side
        # The picture within the tiles: resized to whole pixels, with whole pixels of padding before it.
        height, width = rows // self.side * self.tile, columns // self.side * self.tile
        scale = min(height / size[0], width / size[1])
        filled_height = min(math.ceil(size[0] * scale), height)
        filled_width = min(math.ceil(size[1] * scale), width)
        y, x = (height - filled_height) // 2, (width - filled_width) // 2
        box = (
            (self._edge(left) - x) / filled_width,
            (self._edge(top) - y) / filled_height,
            (self._edge(columns - left, end=True) - x) / filled_width,
            (self._edge(rows - top, end=True) - y) / filled_height,
        )
        seen = self.side * self.patch / self.tile
        views = (
            View((self.side, self.side), (0.0, 0.0, seen, seen), start=0, stride=self.side),
            View((shown_rows, shown_columns), box, start=base, stride=shown_columns + 1),
        )
        tokens = base + shown_rows * (shown_columns + 1)
        pixels = {PIXEL_KEY: out[PIXEL_KEY], "image_sizes": torch.as_tensor(out["image_sizes"]).reshape(1, 2)}
        return EncodedImage(np.full(tokens, self.image_token_id, dtype=np.int64), views, pixels, size)

    def _edge(self, patch: int, end: bool = False) -> int:
        """Pixel of the mosaic where a patch starts, or where the one before it ends.

        They differ between tiles that are no multiple of a patch, whose last pixels no patch sees (SigLIP 384/14).
        """
        tile, inside = divmod(patch - end, self.side)
        return tile * self.tile + (inside + end) * self.patch

    def stack(self, images: Any) -> dict[str, torch.Tensor]:
        """Pad the tiles of all pictures to the largest number among them, as the model expects."""
        if not images:
            return {}
        most = max(i.pixels[PIXEL_KEY].shape[1] for i in images)
        tiles = [
            F.pad(i.pixels[PIXEL_KEY], (0, 0, 0, 0, 0, 0, 0, most - i.pixels[PIXEL_KEY].shape[1]))
            for i in images
        ]
        return {
            PIXEL_KEY: torch.cat(tiles),
            "image_sizes": torch.cat([i.pixels["image_sizes"] for i in images]),
        }


def mosaic_pictures(config: Any, batch: dict[str, torch.Tensor], processor: Any) -> Pictures:
    """Thumbnail and mosaic of each picture: (3, rows * patch, columns * patch) in [0, 1], two a picture.

    What a tile has beyond its last whole patch is left out, as the tower leaves it out.
    """
    patch = int(config.vision_config.patch_size)
    pixels = unnormalise(batch[PIXEL_KEY], processor.image_processor)
    tile = pixels.shape[-1]
    side = tile // patch
    pinpoints = list(config.image_grid_pinpoints)
    views: Pictures = []
    for tiles, size in zip(
        pixels[..., : side * patch, : side * patch], batch["image_sizes"].tolist(), strict=True
    ):
        rows, columns, top, left = mosaic(tuple(size), pinpoints, tile, side)
        tile_rows, tile_columns = rows // side, columns // side
        grid = tiles[1 : 1 + tile_rows * tile_columns].unflatten(0, (tile_rows, tile_columns))
        whole = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        views.append(tiles[0])
        views.append(whole[:, top * patch : (rows - top) * patch, left * patch : (columns - left) * patch])
    return views


def smallest_mosaic(hf: Any, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Pixel arguments of a grey picture of the fewest tiles."""
    tile = int(hf.config.vision_config.image_size)
    size = min(hf.config.image_grid_pinpoints, key=lambda p: p[0] * p[1])
    tiles = 1 + (size[0] // tile) * (size[1] // tile)
    return {
        PIXEL_KEY: torch.zeros(1, tiles, 3, tile, tile, device=device, dtype=dtype),
        "image_sizes": torch.tensor([list(size)]),
    }


@register_family("llava_next", images=LlavaNextImages)
def llava_next(hf: Any) -> Anatomy:
    """Anatomy of ``LlavaNextForConditionalGeneration``."""
    return Anatomy(
        family="llava_next",
        vision_tower=("model.vision_tower",),
        projector=("model.multi_modal_projector", "model.image_newline"),
        language_model="model.language_model",
        lm_head="lm_head",
        pictures=partial(mosaic_pictures, hf.config),
        dummy=smallest_mosaic,
    )
