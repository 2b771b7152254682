"""InternVL (the Hugging Face port): square tiles and a thumbnail, patches merged 2x2 by a pixel shuffle."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from ..anatomy import Anatomy, register_family
from ..errors import UserError
from ..geometry import PIXEL_KEY, EncodedImage, ImageEncoder, process_picture
from .tiles import Box, tile_boxes, tile_view, tiled_anatomy


def _pair(value: Any) -> tuple[int, int]:
    """A side, or (height, width)."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _tile(config: Any) -> tuple[int, int, int]:
    """Pixels along a tile, tokens along it, and pixels along what one token shows."""
    vision = config.vision_config
    (height, width), (patch, other) = _pair(vision.image_size), _pair(vision.patch_size)
    if height != width or patch != other:
        raise UserError(
            f"tiles of {height}x{width} pixels in patches of {patch}x{other}: they have to be square"
        )
    merged = round(1 / float(config.downsample_ratio))
    return height, height // patch // merged, patch * merged


class InternVLImages(ImageEncoder):
    """Tokens of a picture: the tiles row by row, then the thumbnail, between image-start and image-end."""

    def __init__(self, processor: Any, config: Any):
        super().__init__(processor, config)
        self.tile, self.side, self.span = _tile(config)
        start = getattr(processor, "start_image_token", "<img>")
        end = getattr(processor, "end_image_token", "</img>")
        self.placeholder = f"{start}{self.placeholder}{end}"

    @property
    def mark(self) -> str:
        """The image token: the processor itself writes image-start and image-end around it."""
        return self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)

    def encode(self, picture: Image.Image) -> EncodedImage:
        """One RGB picture -> ``pixel_values`` (tiles, 3, H, W), one view a tile."""
        pixels = process_picture(self.processor, picture)[PIXEL_KEY]
        seen = self.side * self.span / self.tile
        boxes: list[Box] = [(0.0, 0.0, seen, seen)]
        if len(pixels) > 1:
            rows, columns = self._cut(picture)
            cut = tile_boxes(rows, columns, seen)
            boxes = [*cut, *boxes] if len(pixels) > len(cut) else cut  # the thumbnail comes last
        tokens = self.side**2
        return EncodedImage(
            np.full(len(pixels) * tokens, self.image_token_id, dtype=np.int64),
            tuple(
                tile_view(self.side, b, i * tokens) for i, b in zip(range(len(pixels)), boxes, strict=True)
            ),
            {PIXEL_KEY: pixels},
            (picture.height, picture.width),
            pixel_rows=len(pixels),
        )

    def _cut(self, picture: Image.Image) -> tuple[int, int]:
        """Rows and columns of tiles, by the image processor's own rule."""
        from transformers.models.got_ocr2 import image_processing_got_ocr2 as stock

        images = self.processor.image_processor
        size = (int(images.size["height"]), int(images.size["width"]))
        columns, rows = stock.get_optimal_tiled_canvas(
            (picture.height, picture.width), size, images.min_patches, images.max_patches
        )
        return rows, columns


@register_family("internvl", images=InternVLImages)
def internvl(hf: Any) -> Anatomy:
    """Anatomy of ``InternVLForConditionalGeneration``."""
    tile, _, span = _tile(hf.config)
    return tiled_anatomy(
        hf,
        tile,
        span,
        vision_tower=("model.vision_tower",),
        projector=("model.multi_modal_projector",),
        language_model="model.language_model",
    )
