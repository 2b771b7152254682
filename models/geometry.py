"""How a picture becomes tokens: views, grids, and the encoder that makes them (the data side of a family).

A *view* is one grid of patches that the vision tower saw: the whole picture in LLaVA-1.5; a thumbnail and
a mosaic of tiles in LLaVA-NeXT; the picture at its native resolution in Qwen2.5-VL. Every method that needs
to know which token shows which part of the picture reads views and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import get_size_with_aspect_ratio

PER_IMAGE_KEYS = ("image_sizes", "image_grid_thw", "pixel_attention_mask")
"""Batch keys with one row an image (when the family has them)."""

PIXEL_KEY = "pixel_values"
"""Batch key with ``pixel_rows[i]`` rows for image ``i`` (1 in most families, patches in Qwen2-VL)."""


@dataclass(frozen=True)
class View:
    """One grid of patches.

    Attributes:
        grid: (rows, columns) of patches, one visual token each.
        box: (left, top, right, bottom) of the grid in the original picture, in shares of its width and
            height; outside 0..1 where the processor padded the picture.
        start: index of the first patch's token within the image's tokens.
        stride: tokens from one row of patches to the next (``columns``, or more where a newline token
            ends each row).
    """

    grid: tuple[int, int]
    box: tuple[float, float, float, float]
    start: int
    stride: int

    @property
    def patches(self) -> int:
        """Number of patches."""
        return self.grid[0] * self.grid[1]


@dataclass
class EncodedImage:
    """One picture, ready for the model.

    Attributes:
        token_ids: (n,) int64, what replaces the single image token of the tokenised text: as many image tokens
            as the model makes features, and what stands between them.
        views: the grids among those tokens.
        pixels: the family's own tensors for this picture; ``pixel_values`` has ``pixel_rows`` rows, every
            other key one row.
        size: (height, width) of the original picture in pixels.
        patch_targets: (patches of all views, M) bfloat16, stored beside the picture; None: nothing was.
    """

    token_ids: np.ndarray
    views: tuple[View, ...]
    pixels: dict[str, torch.Tensor]
    size: tuple[int, int]
    pixel_rows: int = field(default=1)
    patch_targets: torch.Tensor | None = None


class ImageEncoder(ABC):
    """Pictures -> tokens, views and pixel tensors, by the rules of one model family.

    Runs in data-loader workers: it holds the Hugging Face processor and configuration, never the model.
    """

    placeholder: str
    """What stands in the rendered text for one picture, wrapper tokens included."""
    image_token_id: int

    def __init__(self, processor: Any, config: Any):
        self.processor = processor
        self.config = config
        self.image_token_id = int(image_token_id(config))
        self.placeholder = processor.tokenizer.convert_ids_to_tokens(self.image_token_id)

    @property
    def mark(self) -> str:
        """What the family's own processor wants to find in a text for one picture, and replaces."""
        return self.placeholder

    @abstractmethod
    def encode(self, picture: Image.Image) -> EncodedImage:
        """One RGB picture."""

    def stack(self, images: Sequence[EncodedImage]) -> dict[str, torch.Tensor]:
        """Batch form of several pictures: one entry an image, in order of appearance."""
        if not images:
            return {}
        return {key: torch.cat([i.pixels[key] for i in images]) for key in images[0].pixels}

    def positions(self, image_of_token: np.ndarray, images: Sequence[EncodedImage]) -> np.ndarray:
        """Position ids of one document from 0: (n,) int64, or (3, n) for families with M-RoPE.

        Args:
            image_of_token: (n,) ordinal of the picture each token belongs to, -1 for text.
        """
        return np.arange(len(image_of_token), dtype=np.int64)


_DECIDES = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
}
"""Switch of an image processor -> what it makes use of."""
_GRID = (
    "image_grid_pinpoints", "patch_size", "merge_size", "temporal_patch_size", "do_image_splitting", "max_image_size",
    "crop_to_patches", "min_patches", "max_patches",
)  # fmt: skip
_MERGES = ("scale_factor", "downsample_ratio", "mm_tokens_per_image", "vision_aspect_ratio")


def geometry_id(images: ImageEncoder) -> str:
    """What decides which pixels each patch of a picture shows, as ``family; key=value; ...``.

    Two models with equal text cut every picture into the same views of the same pixels; mean and standard
    deviation do not matter (but for the colour that pads to a square). The text survives saving and loading,
    and is the same on transformers 4 and 5 and for both kinds of image processor (whose resizing differs by
    rounding).
    """
    config, processor = images.config, images.processor
    vision, pictures = getattr(config, "vision_config", None), processor.image_processor
    found: dict[str, str] = {}
    for switch, names in _DECIDES.items():
        if getattr(pictures, switch, None):
            found.update({name: _text(getattr(pictures, name, None)) for name in names})
    if getattr(pictures, "do_pad", None) and hasattr(pictures, "pad_to_square"):
        found["pad_to_square"] = _text(getattr(pictures, "image_mean", None))  # it pads with that colour
    found.update({name: _text(getattr(pictures, name, None)) for name in _GRID})
    found["tower"] = _text([getattr(vision, name, None) for name in ("image_size", "patch_size")])
    found["merge"] = _text(getattr(vision, "spatial_merge_size", None))
    found.update({name: _text(getattr(config, name, None)) for name in _MERGES})
    found["patch"] = _text(getattr(processor, "patch_size", None))
    return "; ".join([config.model_type, *(f"{k}={v}" for k, v in sorted(found.items()) if v)])


def _text(value: Any) -> str:
    """A setting in one way of writing, whatever its class is in this version of transformers; empty: not set."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_text, value)) + "]" if any(v is not None for v in value) else ""
    if isinstance(value, int):  # an enumeration's member, too
        return str(int(value))
    if isinstance(value, Iterable) and not isinstance(value, str):
        sides = {str(k): v for k, v in dict(value).items() if v is not None}
        return "{" + ",".join(f"{k}:{_text(v)}" for k, v in sorted(sides.items())) + "}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def image_token_id(config: Any) -> int:
    """Id of the image token (``image_token_id``, or ``image_token_index`` in older configurations)."""
    value = getattr(config, "image_token_id", None)
    return int(config.image_token_index if value is None else value)


def process_picture(processor: Any, picture: Image.Image) -> dict[str, torch.Tensor]:
    """Run the Hugging Face image processor on one picture; tensors with one row an image or patch."""
    return dict(processor.image_processor(images=[picture], return_tensors="pt"))


def resize_and_crop_box(
    image_processor: Any, width: int, height: int
) -> tuple[float, float, float, float, int, int]:
    """Where the processed pixels of a resize-and-centre-crop processor lie in the original picture.

    A processor that first pads the picture to a square (``do_pad`` of LLaVA's own) gives a box that reaches
    beyond 0..1.

    Returns:
        left, top, right, bottom in shares of the original, and the processed height and width in pixels.
    """
    if getattr(image_processor, "do_pad", False) and hasattr(image_processor, "pad_to_square"):
        side = max(width, height)
        left, top, right, bottom, *out = _resized_and_cropped(image_processor, side, side)
        x, y = (side - width) // 2, (side - height) // 2
        return (
            (left * side - x) / width,
            (top * side - y) / height,
            (right * side - x) / width,
            (bottom * side - y) / height,
            out[0],
            out[1],
        )
    return _resized_and_cropped(image_processor, width, height)


def _resized_and_cropped(
    image_processor: Any, width: int, height: int
) -> tuple[float, float, float, float, int, int]:
    """:func:`resize_and_crop_box` of a processor that pads nothing beforehand."""
    size = dict(image_processor.size) if getattr(image_processor, "do_resize", True) else {}
    if size.get("shortest_edge"):
        # The processor's own rule: the longer edge loses its fraction.
        resized = get_size_with_aspect_ratio((height, width), size["shortest_edge"], size.get("longest_edge"))
    elif size.get("height"):
        resized = (int(size["height"]), int(size["width"]))
    else:
        resized = (height, width)
    out = resized
    if getattr(image_processor, "do_center_crop", False):
        out = (int(image_processor.crop_size["height"]), int(image_processor.crop_size["width"]))
    # Whole pixels cut (or, below 0, padded) before the picture; the rest is cut after it.
    top, left = (_cut(whole - part, image_processor) for whole, part in zip(resized, out, strict=True))
    return (
        left / resized[1],
        top / resized[0],
        (left + out[1]) / resized[1],
        (top + out[0]) / resized[0],
        out[0],
        out[1],
    )


def _cut(excess: int, image_processor: Any) -> int:
    """Pixels that a centre crop takes from the left or the top of a picture that is ``excess`` too large."""
    half, odd = divmod(excess, 2)
    # Both kinds of processor cut the smaller half first; when they pad, torchvision's pads the smaller half
    # first and NumPy's the larger.
    torchvision = (
        getattr(image_processor, "is_fast", False)
        or getattr(image_processor, "backend", None) == "torchvision"
    )
    return half + odd if excess < 0 and torchvision else half
