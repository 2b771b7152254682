"""Gemma 3: one square grid an image, patches averaged; images see themselves both ways, most layers see a window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from ..anatomy import Anatomy, register_family
from ..errors import UserError
from ..geometry import PIXEL_KEY, EncodedImage, ImageEncoder, process_picture
from .tiles import tile_view, tiled_anatomy


def _tile(config: Any) -> tuple[int, int, int]:
    """Pixels along a picture, tokens along it, and pixels along what one token shows."""
    vision = config.vision_config
    patches, side = int(vision.image_size) // int(vision.patch_size), math.isqrt(config.mm_tokens_per_image)
    return int(vision.image_size), side, patches // side * int(vision.patch_size)


class Gemma3Images(ImageEncoder):
    """Every picture becomes ``mm_tokens_per_image`` tokens between image-start and image-end and empty lines.

    Raises:
        UserError: the image processor cuts pictures ("pan and scan"), which is not supported.
    """

    def __init__(self, processor: Any, config: Any):
        super().__init__(processor, config)
        self.tile, self.side, self.span = _tile(config)
        tokenizer = processor.tokenizer
        start = getattr(tokenizer, "boi_token", "<start_of_image>")
        end = getattr(tokenizer, "eoi_token", "<end_of_image>")
        self.placeholder = f"\n\n{start}{self.placeholder}{end}\n\n"
        if getattr(processor.image_processor, "do_pan_and_scan", None):
            raise UserError(
                "do_pan_and_scan of Gemma 3's image processor is not supported: set it to false in preprocessor_config.json"
            )

    @property
    def mark(self) -> str:
        """Image-start, of which the processor makes the whole."""
        return getattr(self.processor.tokenizer, "boi_token", "<start_of_image>")

    def encode(self, picture: Image.Image) -> EncodedImage:
        """One RGB picture -> ``pixel_values`` (1, 3, H, W), one view."""
        pixels = process_picture(self.processor, picture)[PIXEL_KEY]
        seen = self.side * self.span / self.tile
        return EncodedImage(
            np.full(self.side**2, self.image_token_id, dtype=np.int64),
            (tile_view(self.side, (0.0, 0.0, seen, seen), 0),),
            {PIXEL_KEY: pixels},
            (picture.height, picture.width),
        )


@register_family("gemma3", images=Gemma3Images)
def gemma3(hf: Any) -> Anatomy:
    """Anatomy of ``Gemma3ForConditionalGeneration``."""
    tile, _, span = _tile(hf.config)
    return tiled_anatomy(
        hf,
        tile,
        span,
        vision_tower=("model.vision_tower",),
        projector=("model.multi_modal_projector",),
        language_model="model.language_model",
        token_types="token_type_ids",
        bidirectional_images=True,
    )
