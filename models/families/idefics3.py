"""Idefics3 and SmolVLM: square tiles, each behind a token that names its row and column, then the whole picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from ..anatomy import Anatomy, register_family
from ..errors import UserError
from ..geometry import PIXEL_KEY, EncodedImage, ImageEncoder, View
from .tiles import Box, tile_boxes, tile_view, tiled_anatomy

_WRAPPER, _WHOLE = "<fake_token_around_image>", "<global-img>"


def _tile(config: Any) -> tuple[int, int]:
    """Tokens along a tile, and pixels along what one token shows (patches merged by the connector)."""
    vision = config.vision_config
    patches = int(vision.image_size) // int(vision.patch_size)
    return patches // int(config.scale_factor), int(vision.patch_size) * int(config.scale_factor)


class Idefics3Images(ImageEncoder):
    """Tokens of a picture: tiles row by row, a marker token before each and a line break after each row, the whole.

    A picture of one tile is the whole alone. Markers belong to no patch and are no visual tokens. An image processor
    whose tiles are not of the tower's size is a ``UserError``.
    """

    def __init__(self, processor: Any, config: Any):
        super().__init__(processor, config)
        self.side, self.span = _tile(config)
        self.tile = int(config.vision_config.image_size)
        self._written: dict[tuple[int, int], tuple[np.ndarray, tuple[View, ...]]] = {}

    def encode(self, picture: Image.Image) -> EncodedImage:
        """One RGB picture -> ``pixel_values`` (tiles, 1, 3, H, W), one view a tile, the whole picture last."""
        out = self.processor.image_processor(
            images=[[picture]], return_tensors="pt", return_row_col_info=True
        )
        pixels = out[PIXEL_KEY][0].unsqueeze(1)
        if pixels.shape[-1] != self.tile or pixels.shape[-2] != self.tile:
            raise UserError(
                f"the image processor makes tiles of {pixels.shape[-1]}x{pixels.shape[-2]} pixels, the model takes "
                f"{self.tile}x{self.tile}: set its max_image_size"
            )
        cut = int(out["rows"][0][0]), int(out["cols"][0][0])
        if cut not in self._written:
            self._written[cut] = self._write(*cut)
        token_ids, views = self._written[cut]
        size = (picture.height, picture.width)
        return EncodedImage(token_ids.copy(), views, {PIXEL_KEY: pixels}, size, pixel_rows=len(pixels))

    def _write(self, rows: int, columns: int) -> tuple[np.ndarray, tuple[View, ...]]:
        """Tokens of a picture of so many tiles (0: not cut), and views among them."""
        visual = self.placeholder * self.side**2
        text = ""
        for r in range(rows):
            for c in range(columns):
                text += f"{_WRAPPER}<row_{r + 1}_col_{c + 1}>{visual}"
            text += "\n"
        text += ("\n" if rows else "") + f"{_WRAPPER}{_WHOLE}{visual}{_WRAPPER}"
        # It begins and ends with special tokens: its tokens are the same whatever stands around it.
        ids = np.array(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        seen = self.side * self.span / self.tile
        boxes: list[Box] = [*tile_boxes(rows, columns, seen), (0.0, 0.0, seen, seen)]
        starts = np.flatnonzero(ids == self.image_token_id)[:: self.side**2]
        return ids, tuple(tile_view(self.side, b, int(s)) for b, s in zip(boxes, starts, strict=True))


@register_family("idefics3", "smolvlm", images=Idefics3Images)
def idefics3(hf: Any) -> Anatomy:
    """Anatomy of ``Idefics3ForConditionalGeneration`` and ``SmolVLMForConditionalGeneration``."""
    return tiled_anatomy(
        hf,
        int(hf.config.vision_config.image_size),
        _tile(hf.config)[1],
        nested=True,
        vision_tower=("model.vision_model",),
        projector=("model.connector",),
        language_model="model.text_model",
    )
