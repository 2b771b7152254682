"""LLaVA-1.5: one square grid an image, features of one layer of a ViT, a two-layer MLP."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..anatomy import Anatomy, Pictures, register_family, unnormalise
from ..errors import UserError
from ..geometry import PIXEL_KEY, EncodedImage, ImageEncoder, View, process_picture, resize_and_crop_box


class LlavaImages(ImageEncoder):
    """Every picture becomes ``rows * columns`` image tokens in raster order."""

    def __init__(self, processor: Any, config: Any):
        super().__init__(processor, config)
        self.patch = int(processor.patch_size)
        self.extra = int(processor.num_additional_image_tokens)
        if processor.vision_feature_select_strategy == "default":
            self.extra -= 1  # the class token is computed and then dropped

    def encode(self, picture: Image.Image) -> EncodedImage:
        """One RGB picture -> ``pixel_values`` (1, 3, H, W), one view."""
        pixels = process_picture(self.processor, picture)[PIXEL_KEY]
        rows, columns = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        left, top, right, bottom, height, width = resize_and_crop_box(
            self.processor.image_processor, picture.width, picture.height
        )
        # A ViT whose input is no multiple of its patch never sees the last pixels (SigLIP 384/14: 6 of 384).
        right = left + (right - left) * columns * self.patch / width
        bottom = top + (bottom - top) * rows * self.patch / height
        view = View((rows, columns), (left, top, right, bottom), start=self.extra, stride=columns)
        token_ids = np.full(rows * columns + self.extra, self.image_token_id, dtype=np.int64)
        return EncodedImage(token_ids, (view,), {PIXEL_KEY: pixels}, (picture.height, picture.width))


def llava_pictures(batch: dict[str, torch.Tensor], processor: Any) -> Pictures:
    """Each view as the tower saw it: (3, rows * patch, columns * patch) in [0, 1]."""
    patch = int(processor.patch_size)
    pixels = unnormalise(batch[PIXEL_KEY], processor.image_processor)
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    return list(pixels[..., : rows * patch, : columns * patch].unbind(0))


@register_family("llava", "opsin_llava", images=LlavaImages)
def llava(hf: Any) -> Anatomy:
    """Anatomy of ``LlavaForConditionalGeneration``, and of our own class beside it (``models/own_llava.py``)."""
    layer = hf.config.vision_feature_layer
    if not isinstance(layer, int):
        raise UserError(
            f"vision_feature_layer {layer}: Opsin reads one layer of the vision tower, not several"
        )
    return Anatomy(
        family="llava",
        vision_tower=("model.vision_tower",),
        projector=("model.multi_modal_projector",),
        language_model="model.language_model",
        lm_head="lm_head",
        pictures=llava_pictures,
        dummy=lambda hf, device, dtype: {PIXEL_KEY: dummy_square(hf, device, dtype)},
    )


def dummy_square(hf: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A grey picture of the tower's size, (1, 3, H, W)."""
    side = hf.config.vision_config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    return torch.zeros(1, 3, height, width, device=device, dtype=dtype)
