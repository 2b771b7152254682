"""Shaded pictures of single things, made once and kept: objects, shadows, sign boards, backdrops, letters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 44),
    "green": (48, 164, 62),
    "blue": (40, 84, 222),
    "yellow": (246, 216, 36),
    "purple": (142, 58, 198),
    "cyan": (52, 202, 220),
    "orange": (246, 134, 26),
    "gray": (122, 122, 128),
}
"""Colour name -> sRGB of a fully lit surface."""

BACKDROPS = 6
HORIZON = 0.45
"""Where floor and wall meet, as a share of the picture's height."""

_OVERSAMPLING = 4
_AMBIENT = 0.46
_LIGHT = np.array([-0.42, -0.62, 0.66], np.float32)  # from the upper left, towards the viewer
_TINTS = (
    (250, 244, 232),
    (238, 243, 250),
    (240, 247, 238),
    (250, 239, 238),
    (243, 240, 250),
    (244, 244, 240),
)

Planes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Inside (bool), diffuse light 0 .. 1, highlight 0 .. 1, relief towards the viewer 0 .. 1, each (n, n)."""


@dataclass(frozen=True)
class Sprite:
    """One object on a transparent square.

    Attributes:
        image: RGBA, side x side.
        mask: (side, side) bool, pixels that belong to the object.
        relief: (side, side) float32, how far the surface comes out towards the viewer, in half sides.
        box: x0, y0, x1, y1 of the mask (x1, y1 excluded).
        pixels: number of pixels in the mask.
    """

    image: Image.Image
    mask: np.ndarray
    relief: np.ndarray
    box: tuple[int, int, int, int]
    pixels: int


def _lit(*normal: float) -> float:
    unit = np.asarray(normal, np.float32) / np.linalg.norm(normal)
    return float(np.clip(unit @ _LIGHT, 0, 1))


def _sphere(u: np.ndarray, v: np.ndarray) -> Planes:
    radius = 0.92
    x, y = u / radius, (v - 0.02) / radius
    r2 = x * x + y * y
    z = np.sqrt(np.clip(1 - r2, 0, 1))
    light = np.clip(_LIGHT[0] * x + _LIGHT[1] * y + _LIGHT[2] * z, 0, 1)
    return r2 < 1, light, light**22 * 0.75, z * radius


def _cube(u: np.ndarray, v: np.ndarray) -> Planes:
    # A square front, with the top and the right face running back at the same slant.
    half, back_x, back_y = 0.68, 0.36, 0.38
    x, y = u + 0.2, v - 0.25
    front = (np.abs(x) < half) & (np.abs(y) < half)
    up = np.clip((-half - y) / back_y, 0, 1)
    top = (y <= -half) & (y > -half - back_y) & (np.abs(x - up * back_x) < half)
    aside = np.clip((x - half) / back_x, 0, 1)
    right = (x >= half) & (x < half + back_x) & (np.abs(y + aside * back_y) < half)
    light = np.where(front, 0.66 - 0.1 * y, np.where(top, 1.0, 0.2)).astype(np.float32)
    relief = np.where(front, 0.7, np.where(top, 0.7 * (1 - up), 0.7 * (1 - aside))).astype(np.float32)
    return front | top | right, light, np.zeros_like(u), relief


def _cylinder(u: np.ndarray, v: np.ndarray) -> Planes:
    half, rim, high, low = 0.62, 0.2, -0.72, 0.72
    x = u / half
    bulge = np.sqrt(np.clip(1 - x * x, 0, 1))
    top = x * x + ((v - high) / rim) ** 2 < 1
    body = (np.abs(x) < 1) & (v > high) & (v < low + rim * bulge)
    light = np.where(top, 0.95, np.clip(_LIGHT[0] * x * 1.2 + 0.72 * bulge, 0, 1))
    shine = np.where(top, 0, np.exp(-(((x + 0.45) / 0.16) ** 2)) * 0.28)
    return top | body, light, shine, np.where(top, 0.3, bulge * half)


def _cone(u: np.ndarray, v: np.ndarray) -> Planes:
    tip, low, half, rim = -0.94, 0.7, 0.84, 0.22
    width = np.clip((v - tip) / (low - tip), 1e-3, None) * half
    x = np.clip(u / width, -1, 1)
    body = (np.abs(u) < width) & (v > tip) & (v < low)
    base = ((u / half) ** 2 + ((v - low) / rim) ** 2 < 1) & (v >= low)
    x = np.where(base, u / half, x)
    bulge = np.sqrt(np.clip(1 - x * x, 0, 1))
    light = np.clip(_LIGHT[0] * x * 1.2 + 0.66 * bulge, 0, 1)
    shine = np.exp(-(((x + 0.42) / 0.18) ** 2)) * 0.22
    return body | base, light, shine, bulge * np.minimum(width, half)


_SOLIDS: dict[str, Callable[[np.ndarray, np.ndarray], Planes]] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
}


def _shrink(plane: np.ndarray) -> np.ndarray:
    n = plane.shape[0] // _OVERSAMPLING
    return plane.reshape(n, _OVERSAMPLING, n, _OVERSAMPLING).mean((1, 3), dtype=np.float32)


@lru_cache(1024)
def _solid(shape: str, side: int) -> Planes:
    """Cover (0 .. 1), light, highlight and relief of a shape, means over sub-pixels, whatever its colour."""
    n = side * _OVERSAMPLING
    axis = ((np.arange(n, dtype=np.float32) + 0.5) / n) * 2 - 1
    u, v = np.meshgrid(axis, axis)
    inside, light, shine, relief = _SOLIDS[shape](u, v)
    cover = _shrink(inside)
    weight = np.maximum(cover, 1e-6)
    return (
        cover,
        _shrink(light * inside) / weight,
        _shrink(shine * inside) / weight,
        _shrink(relief * inside) / weight,
    )


@lru_cache(8192)
def sprite(shape: str, colour: str, side: int) -> Sprite:
    """The object on a square of ``side`` pixels, standing on the square's lower edge."""
    cover, light, shine, relief = _solid(shape, side)
    lit = np.array(PALETTE[colour], np.float32) * (_AMBIENT + (1 - _AMBIENT) * light)[..., None]
    rgb = lit + (255 - lit) * shine[..., None]
    rgba = np.dstack([rgb, cover * 255]).clip(0, 255).round().astype(np.uint8)
    mask = cover >= 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Sprite(Image.fromarray(rgba), mask, relief.astype(np.float32), box, int(mask.sum()))


@lru_cache(1024)
def shadow(side: int) -> Image.Image:
    """Soft dark ellipse under an object of ``side`` pixels (RGBA)."""
    width, height = max(4, round(side * 1.25)), max(3, round(side * 0.42))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    r2 = ((x + 0.5) / width * 2 - 1) ** 2 + ((y + 0.5) / height * 2 - 1) ** 2
    alpha = np.clip(1 - r2, 0, 1) * 120
    rgba = np.dstack([np.full((height, width, 3), 28.0), alpha]).round().astype(np.uint8)
    return Image.fromarray(rgba)


@lru_cache(64)
def backdrop(size: int, variant: int) -> Image.Image:
    """Pale wall over a slightly darker floor (RGB); ``variant`` 0 .. BACKDROPS - 1 changes the tint."""
    y = (np.arange(size, dtype=np.float32) + 0.5) / size
    wall = 0.93 + 0.07 * y / HORIZON
    floor = 0.74 + 0.16 * (y - HORIZON) / (1 - HORIZON)
    edge = np.clip((y - HORIZON) * size / 2 + 0.5, 0, 1)  # two pixels wide at any size
    level = wall * (1 - edge) + floor * edge
    rgb = level[:, None, None] * np.array(_TINTS[variant], np.float32)
    return Image.fromarray(np.broadcast_to(rgb, (size, size, 3)).round().astype(np.uint8))


@lru_cache(256)
def letters(text: str, height: int) -> Image.Image:
    """Text as an alpha plane ("L"), as wide as its letters; all texts of one ``height`` share a baseline.

    ``height`` is the font's nominal size in pixels. The font is the one that Pillow carries.
    """
    font = ImageFont.load_default(height)
    x0, _, x1, _ = (round(edge) for edge in font.getbbox(text))
    top = round(font.getbbox("dkl")[1])
    bottom = round(font.getbbox("gpy")[3])
    plane = Image.new("L", (x1 - x0, bottom - top))
    ImageDraw.Draw(plane).text((-x0, -top), text, fill=255, font=font)
    return plane


def write(image: Image.Image, text: str, height: int, left: int, top: int) -> None:
    """Write dark letters on ``image``, their upper left corner at (left, top)."""
    plane = letters(text, height)
    image.paste((24, 24, 28), (left, top, left + plane.width, top + plane.height), plane)


@lru_cache(256)
def board(word: str, size: int) -> Image.Image:
    """A white board with ``word`` on it, for a picture of ``size`` pixels (RGB)."""
    height = max(11, round(size * 0.15))
    plane = letters(word, height)
    line = max(1, size // 96)
    pad = max(2, round(size * 0.025)) + line
    image = Image.new("RGB", (plane.width + 2 * pad, plane.height + 2 * pad - line), (255, 255, 255))
    ImageDraw.Draw(image).rectangle(
        (0, 0, image.width - 1, image.height - 1), outline=(70, 62, 56), width=line
    )
    write(image, word, height, pad, pad - line // 2)
    return image
