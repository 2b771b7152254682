"""Attention painted over pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, PALE = (252, 252, 250), (40, 40, 44), (120, 120, 126)
SIDE, GAP, TITLE = 168, 10, 40
"""Pixels: longer side of a picture, space between, height of a row's two lines of text."""

RAMP = np.array(
    [(12, 10, 40), (86, 20, 112), (178, 46, 96), (236, 110, 52), (250, 190, 60), (252, 250, 200)], float
)
"""Colours from no attention to the most; their lightness rises evenly, so that the map reads without colour, too."""
OUTLINE = (60, 230, 240)
LEAST_SCALE = 4
"""The brightest colour stands for so many times a map's mean at least: attention that is spread evenly looks even, and dim."""


@dataclass(frozen=True)
class ViewMap:
    """Attention on one view's patches.

    Attributes:
        attention: (layers, rows, columns).
        box: left, top, right, bottom of the view in the original picture, in shares.
    """

    attention: np.ndarray
    box: tuple[float, ...]


@dataclass(frozen=True)
class Example:
    """A question whose attention is drawn.

    Attributes:
        question, answer: in words; the answer is the gold one.
        picture: encoded.
        views: of this picture.
        box: of the asked object in shares of the picture; None: not about one object.
        pointing: (layers,) ratio; None likewise.
    """

    question: str
    answer: str
    picture: bytes
    views: tuple[ViewMap, ...]
    box: tuple[float, ...] | None = None
    pointing: np.ndarray | None = None


def density(views: Sequence[ViewMap], layer: int, size: tuple[int, int]) -> np.ndarray:
    """Attention by area of the picture, summed over views: (height, width), 0 where no patch looks.

    Args:
        views: of one picture.
        layer: from 0.
        size: (width, height) in pixels of the map.
    """
    width, height = size
    out = np.zeros((height, width))
    for view in views:
        mass = view.attention[layer]
        left, top, right, bottom = view.box
        # Which patch shows the centre of each pixel; -1 or the number of patches: none does.
        column = np.floor(((np.arange(width) + 0.5) / width - left) / (right - left) * mass.shape[1]).astype(
            int
        )
        row = np.floor(((np.arange(height) + 0.5) / height - top) / (bottom - top) * mass.shape[0]).astype(
            int
        )
        inside = ((row >= 0) & (row < mass.shape[0]))[:, None] & ((column >= 0) & (column < mass.shape[1]))
        patch = (right - left) * (bottom - top) / mass.size
        shown = mass[row.clip(0, mass.shape[0] - 1)[:, None], column.clip(0, mass.shape[1] - 1)] / patch
        out += np.where(inside, shown, 0)
    return out


def overlay(picture: Image.Image, strength: np.ndarray) -> Image.Image:
    """A dimmed, colourless picture under a map (height, width) of the same size, whose largest value is 1."""
    grey = np.asarray(picture.convert("L"), float)[..., None] * 0.55 + 20
    place = strength.clip(0, 1) * (len(RAMP) - 1)
    lower = np.minimum(place.astype(int), len(RAMP) - 2)
    part = (place - lower)[..., None]
    colour = RAMP[lower] * (1 - part) + RAMP[lower + 1] * part
    alpha = 0.25 + 0.6 * strength.clip(0, 1)[..., None]
    return Image.fromarray((grey * (1 - alpha) + colour * alpha).round().clip(0, 255).astype(np.uint8))


def heat_sheet(examples: Sequence[Example], layers: Sequence[int]) -> Image.Image:
    """One row a question: the picture, then its map in each of ``layers`` (from 1), each on a scale of its own.

    The asked object's box is outlined; below a map stands its pointing ratio.
    """
    pictures = [_shown(example.picture) for example in examples]
    heights = [picture.height for picture in pictures]
    size = ((1 + len(layers)) * (SIDE + GAP) + GAP, sum(heights) + len(examples) * (TITLE + 3 * GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen, words, small = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(11)
    top = GAP
    for example, picture in zip(examples, pictures, strict=True):
        most = round(size[0] / 7)
        pen.text((GAP, top), _cut(f"{example.question}  gold: {example.answer}", most), fill=INK, font=words)
        at = top + TITLE
        _place(sheet, picture, example.box, (GAP, at))
        for i, layer in enumerate(layers):
            left = GAP + (i + 1) * (SIDE + GAP)
            strength = density(example.views, layer - 1, picture.size)
            drawn = overlay(picture, strength / max(strength.max(), LEAST_SCALE * strength.mean(), 1e-12))
            _place(sheet, drawn, example.box, (left, at))
            ratio = "" if example.pointing is None else f"   pointing {example.pointing[layer - 1]:.2f}"
            pen.text((left, at - 16), f"layer {layer}{ratio}", fill=PALE, font=small)
        top = at + picture.height + 3 * GAP
    return sheet


def _cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _shown(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded)) as opened:
        picture = opened.convert("RGB")
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _place(
    sheet: Image.Image, picture: Image.Image, box: tuple[float, ...] | None, corner: tuple[int, int]
) -> None:
    sheet.paste(picture, corner)
    if box is None:
        return
    x, y = corner
    x0, x1 = (x + round(edge * picture.width) for edge in box[::2])
    y0, y1 = (y + round(edge * picture.height) for edge in box[1::2])
    ImageDraw.Draw(sheet).rectangle((x0 - 1, y0 - 1, x1, y1), outline=OUTLINE, width=2)
