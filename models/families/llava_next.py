"""LLaVA-NeXT (any resolution): a thumbnail, then a mosaic of tiles cropped to the picture, newline tokens."""

from __future__ import annotations

import math
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
        self.side = self.tile // int(config.vision_config.patch_size)

    def encode(self, picture: Image.Image) -> EncodedImage:
        """One RGB picture -> ``pixel_values`` (1, 1 + tiles, 3, H, W), ``image_sizes`` (1, 2), two views."""
        out = process_picture(self.processor, picture)
        size = (picture.height, picture.width)
        rows, columns, top, left = mosaic(size, list(self.config.image_grid_pinpoints), self.tile, self.side)
        shown_rows, shown_columns = rows - 2 * top, columns - 2 * left
        if not shown_rows or not shown_columns:
            raise ValueError(
                f"{size[1]}x{size[0]} pixels is so long and thin that no patch of the tiles shows it"
            )
        base = self.side * self.side
        # The picture within the tiles: resized to whole pixels, with whole pixels of padding before it.
        patch = self.tile // self.side
        height, width = rows * patch, columns * patch
        scale = min(height / size[0], width / size[1])
        filled_height = min(math.ceil(size[0] * scale), height)
        filled_width = min(math.ceil(size[1] * scale), width)
        y, x = (height - filled_height) // 2, (width - filled_width) // 2
        box = (
            (left * patch - x) / filled_width,
            (top * patch - y) / filled_height,
            ((columns - left) * patch - x) / filled_width,
            ((rows - top) * patch - y) / filled_height,
        )
        views = (
            View((self.side, self.side), (0.0, 0.0, 1.0, 1.0), start=0, stride=self.side),
            View((shown_rows, shown_columns), box, start=base, stride=shown_columns + 1),
        )
        tokens = base + shown_rows * (shown_columns + 1)
        pixels = {PIXEL_KEY: out[PIXEL_KEY], "image_sizes": torch.as_tensor(out["image_sizes"]).reshape(1, 2)}
        return EncodedImage(np.full(tokens, self.image_token_id, dtype=np.int64), views, pixels, size)

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


def llava_next_pictures(batch: dict[str, torch.Tensor], processor: Any) -> Pictures:
    """Thumbnail and mosaic of each picture: (3, rows * patch, columns * patch) in [0, 1], two a picture."""
    patch = int(processor.patch_size)
    pixels = unnormalise(batch[PIXEL_KEY], processor.image_processor)
    tile = pixels.shape[-1]
    pinpoints = list(processor.image_processor.image_grid_pinpoints)
    views: Pictures = []
    for tiles, size in zip(pixels, batch["image_sizes"].tolist(), strict=True):
        rows, columns, top, left = mosaic(tuple(size), pinpoints, tile, tile // patch)
        tile_rows, tile_columns = rows * patch // tile, columns * patch // tile
        grid = tiles[1 : 1 + tile_rows * tile_columns].unflatten(0, (tile_rows, tile_columns))
        whole = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        views.append(tiles[0])
        views.append(whole[:, top * patch : (rows - top) * patch, left * patch : (columns - left) * patch])
    return views


@register_family("llava_next", images=LlavaNextImages)
def llava_next(hf: Any) -> Anatomy:
    """Anatomy of ``LlavaNextForConditionalGeneration``."""

    def dummy(hf: Any, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tile = int(hf.config.vision_config.image_size)
        size = min(hf.config.image_grid_pinpoints, key=lambda p: p[0] * p[1])
        tiles = 1 + (size[0] // tile) * (size[1] // tile)
        return {
            PIXEL_KEY: torch.zeros(1, tiles, 3, tile, tile, device=device, dtype=dtype),
            "image_sizes": torch.tensor([list(size)]),
        }

    return Anatomy(
        family="llava_next",
        vision_tower=("model.vision_tower",),
        projector=("model.multi_modal_projector", "model.image_newline"),
        language_model="model.language_model",
        lm_head="lm_head",
        pictures=llava_next_pictures,
        dummy=dummy,
    )
