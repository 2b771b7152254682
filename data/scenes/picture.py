"""From facts to pixels: picture, depth map and masks of one scene, each made when it is first asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageDraw

from .config import SceneConfig
from .facts import Bar, Facts, SceneObject, Sign
from .sprites import HORIZON, PALETTE, backdrop, board, letters, shadow, sprite, write

_BASELINE = 0.84  # foot of a chart's bars, share of the height
_TALLEST = 0.74  # height of a bar of value 9
_TOP = 0.03


@dataclass(frozen=True)
class Scene(Facts):
    """Facts, and the pixels that show them.

    Attributes:
        size: side of the picture in pixels.
        backdrop: number of the wall and floor behind the objects.
    """

    size: int = 64
    backdrop: int = 0

    @cached_property
    def picture(self) -> Image.Image:
        """RGB picture, size x size."""
        return _draw_chart(self.size, self.bars) if self.bars else _draw_objects(self)

    @cached_property
    def masks(self) -> np.ndarray:
        """(H, W) uint8: 0 background, i + 1 where object i (of a chart: bar i) is seen."""
        masks = np.zeros((self.size, self.size), np.uint8)
        for i in _far_to_near(self.objects):
            thing = self.objects[i]
            left, top, side = thing.frame
            masks[top : top + side, left : left + side][sprite(thing.shape, thing.colour, side).mask] = i + 1
        for i, bar in enumerate(self.bars):
            x0, y0, x1, y1 = bar.box
            masks[y0:y1, x0:x1] = i + 1
        return masks

    @cached_property
    def depth(self) -> np.ndarray:
        """(H, W) float32: 0 nearest .. 1 the wall; objects bulge towards the viewer. A chart is flat: 1
        everywhere.

        Two objects are further apart in depth than either is thick, so order of depth is order of occlusion.
        """
        if self.bars:
            return np.ones((self.size, self.size), np.float32)
        rows = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size
        depth = np.repeat(np.clip((FRONT - rows) / (FRONT - HORIZON), 0, 1)[:, None], self.size, 1)
        for i in _far_to_near(self.objects):
            thing = self.objects[i]
            left, top, side = thing.frame
            solid = sprite(thing.shape, thing.colour, side)
            surface = thing.depth - solid.relief * (side / self.size / 4)
            depth[top : top + side, left : left + side][solid.mask] = surface[solid.mask]
        return depth.clip(0, 1)


FRONT = 0.95
"""Height on the picture of a point of the floor at depth 0; the horizon is depth 1."""


def ground(depth: float) -> float:
    """Height on the picture (0 top .. 1 bottom) of a point of the floor."""
    return FRONT - (FRONT - HORIZON) * depth


def _far_to_near(objects: tuple[SceneObject, ...]) -> list[int]:
    return sorted(range(len(objects)), key=lambda i: -objects[i].depth)


def _draw_objects(scene: Scene) -> Image.Image:
    image = backdrop(scene.size, scene.backdrop).copy()
    if scene.sign:
        _hang(image, scene.sign)
    for i in _far_to_near(scene.objects):
        thing = scene.objects[i]
        left, top, side = thing.frame
        dark = shadow(side)
        foot = top + side
        image.paste(dark, (left + (side - dark.width) // 2, foot - round(dark.height * 0.74)), dark)
        solid = sprite(thing.shape, thing.colour, side).image
        image.paste(solid, (left, top), solid)
    return image


def _hang(image: Image.Image, sign: Sign) -> None:
    plate = board(sign.word, image.width)
    left = round(sign.x * image.width - plate.width / 2)
    image.paste(plate, (max(1, min(left, image.width - plate.width - 1)), max(1, round(_TOP * image.height))))


def bar_boxes(size: int, values: list[int]) -> list[tuple[int, int, int, int]]:
    """Boxes in pixels (x1, y1 excluded) of a chart's bars with these values, left to right."""
    step = size / (len(values) + 0.4)
    foot = round(_BASELINE * size)
    boxes = []
    for i, value in enumerate(values):
        left = step * (i + 0.35)
        boxes.append((round(left), foot - round(value / 9 * _TALLEST * size), round(left + step * 0.7), foot))
    return boxes


def _draw_chart(size: int, bars: tuple[Bar, ...]) -> Image.Image:
    image = _chart_paper(size).copy()
    draw = ImageDraw.Draw(image)
    text = max(9, round(size * 0.12))
    foot = round(_BASELINE * size)
    for bar in bars:
        x0, y0, x1, y1 = bar.box
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=PALETTE[bar.colour])
        left = (x0 + x1 - letters(str(bar.value), text).width) // 2
        write(image, str(bar.value), text, left, foot + max(1, size // 50))
    draw.line((2, foot, size - 3, foot), fill=(60, 60, 66), width=max(1, size // 96))
    return image


@lru_cache(16)
def _chart_paper(size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), (252, 252, 250))
    draw = ImageDraw.Draw(image)
    for value in (3, 6, 9):
        y = round(_BASELINE * size) - round(value / 9 * _TALLEST * size)
        draw.line((2, y, size - 3, y), fill=(222, 222, 226), width=max(1, size // 160))
    return image


def encode(picture: Image.Image, config: SceneConfig) -> bytes:
    """Encoded picture, by ``config.encoding``; its bytes may differ between versions of Pillow and zlib."""
    buffer = io.BytesIO()
    if config.encoding == "png":
        picture.save(buffer, "PNG", compress_level=3)
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
