"""Qwen2-VL and Qwen2.5-VL: native resolution, 2x2 merged patches, three-axis rotary positions (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from ..anatomy import Anatomy, Pictures, register_family, unnormalise
from ..geometry import PIXEL_KEY, EncodedImage, ImageEncoder, View, process_picture


class QwenVLImages(ImageEncoder):
    """A picture becomes (rows / merge) x (columns / merge) tokens between vision-start and vision-end."""

    def __init__(self, processor: Any, config: Any):
        super().__init__(processor, config)
        self.merge = int(config.vision_config.spatial_merge_size)
        start, end = (
            processor.tokenizer.convert_ids_to_tokens(int(i))
            for i in (config.vision_start_token_id, config.vision_end_token_id)
        )
        self.placeholder = f"{start}{self.placeholder}{end}"

    def encode(self, picture: Image.Image) -> EncodedImage:
        """One RGB picture -> ``pixel_values`` (patches, 3 * 2 * patch * patch), ``image_grid_thw`` (1, 3)."""
        out = process_picture(self.processor, picture)
        thw = torch.as_tensor(out["image_grid_thw"]).reshape(1, 3)
        rows, columns = int(thw[0, 1]) // self.merge, int(thw[0, 2]) // self.merge
        view = View((rows, columns), (0.0, 0.0, 1.0, 1.0), start=0, stride=columns)
        return EncodedImage(
            np.full(rows * columns, self.image_token_id, dtype=np.int64),
            (view,),
            {PIXEL_KEY: out[PIXEL_KEY], "image_grid_thw": thw},
            (picture.height, picture.width),
            pixel_rows=int(out[PIXEL_KEY].shape[0]),
        )

    def positions(self, image_of_token: np.ndarray, images: Sequence[EncodedImage]) -> np.ndarray:
        """(3, n) time, row and column positions; text goes on after the largest position of an image."""
        length = len(image_of_token)
        positions = np.empty((3, length), dtype=np.int64)
        # Segments of equal image ordinal; two pictures in a row differ in theirs.
        cuts = np.flatnonzero(np.diff(image_of_token)) + 1
        base = 0
        for start, end in zip([0, *cuts], [*cuts, length], strict=True):
            ordinal = int(image_of_token[start]) if length else -1
            if ordinal < 0:
                positions[:, start:end] = base + np.arange(end - start)
                base += end - start
                continue
            rows, columns = images[ordinal].views[0].grid
            index = np.arange(end - start)
            positions[:, start:end] = base + np.stack([0 * index, index // columns, index % columns])
            base += max(rows, columns)
        return positions


def qwen_pictures(batch: dict[str, torch.Tensor], processor: Any) -> Pictures:
    """Each picture put together again from its patches: (3, rows * 14, columns * 14) in [0, 1]."""
    images = processor.image_processor
    patch, merge, frames = images.patch_size, images.merge_size, images.temporal_patch_size
    views: Pictures = []
    offset = 0
    for t, h, w in batch["image_grid_thw"].tolist():
        patches = batch[PIXEL_KEY][offset : offset + t * h * w]
        offset += t * h * w
        x = patches.reshape(t, h // merge, w // merge, merge, merge, 3, frames, patch, patch)[..., 0, :, :]
        x = x[0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, h * patch, w * patch)
        views.append(unnormalise(x, images))
    return views


@register_family("qwen2_vl", "qwen2_5_vl", images=QwenVLImages)
def qwen2_vl(hf: Any) -> Anatomy:
    """Anatomy of ``Qwen2VLForConditionalGeneration`` and ``Qwen2_5_VLForConditionalGeneration``."""

    def dummy(hf: Any, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        vision = hf.config.vision_config
        merge = int(vision.spatial_merge_size)
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
        width = int(channels) * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2
        return {
            PIXEL_KEY: torch.zeros(merge * merge, width, device=device, dtype=dtype),
            "image_grid_thw": torch.tensor([[1, merge, merge]], device=device),
        }

    return Anatomy(
        family=hf.config.model_type,
        vision_tower=("model.visual",),
        projector=("model.visual.merger",),
        language_model="model.language_model",
        lm_head="lm_head",
        pictures=qwen_pictures,
        dummy=dummy,
        token_types="mm_token_type_ids" if int(transformers.__version__.split(".")[0]) >= 5 else None,
    )
