"""Where the objects of a scene stand, how large they look and how much of them is seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .config import SceneConfig
from .facts import SceneObject
from .picture import ground
from .sprites import Sprite, sprite

LEAST_VISIBLE = 0.5
"""Share of an object's pixels that is seen at least."""

_X = (0.19, 0.81)
_DEPTH = (0.02, 0.72)
_SPREAD = 0.62  # share of the range that the least gaps between neighbours take up
_WIDEST_GAP = 0.24
_SMALL = 0.58  # a small object's side, in those of a large one at the same depth
_FAR = 0.24  # an object at depth 1 would be this much smaller; 1 - 0.72 * 0.24 > 0.58, so sizes never overlap


@dataclass(frozen=True)
class Attributes:
    """Shape, colour and size of an object that has no place yet."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Spot:
    """A place for an object: ``x`` 0 .. 1 from the left, ``depth`` 0 .. 1 from the front."""

    x: float
    depth: float


def spread(rng: random.Random, n: int, low: float, high: float) -> list[float]:
    """``n`` rising values from ``low`` to ``high``, random but for a least gap between neighbours."""
    if n == 1:
        return [rng.uniform(low, high)]
    gap = min(_WIDEST_GAP, _SPREAD * (high - low) / (n - 1))
    slack = high - low - gap * (n - 1)
    return [low + cut + i * gap for i, cut in enumerate(sorted(rng.random() * slack for _ in range(n)))]


def spots(rng: random.Random, n: int) -> list[Spot]:
    """``n`` spots in random order; any two differ clearly in x and in depth, so any two compare."""
    xs, depths = spread(rng, n, *_X), spread(rng, n, *_DEPTH)
    rng.shuffle(xs)
    rng.shuffle(depths)
    return [Spot(x, depth) for x, depth in zip(xs, depths, strict=True)]


def side_of(config: SceneConfig, size: str, depth: float) -> int:
    """Side in pixels of an object's sprite. The scale depends on how many objects the scenes may have."""
    crowd = max(3, config.objects[1])
    large = config.size * 0.36 * (3 / crowd) ** 0.6 * (1 - _FAR * depth)
    return round(large * (_SMALL if size == "small" else 1))


def stand(
    config: SceneConfig, attributes: Sequence[Attributes], places: Sequence[Spot]
) -> tuple[SceneObject, ...] | None:
    """Put the objects on their spots; None when one of them would be hidden by more than half."""
    sprites: list[Sprite] = []
    frames: list[tuple[int, int, int]] = []
    for a, spot in zip(attributes, places, strict=True):
        side = side_of(config, a.size, spot.depth)
        left = min(max(round(spot.x * config.size - side / 2), 0), config.size - side)
        sprites.append(sprite(a.shape, a.colour, side))
        frames.append((left, round(ground(spot.depth) * config.size) - side, side))
    objects = []
    for i, (a, spot) in enumerate(zip(attributes, places, strict=True)):
        nearer = [j for j, other in enumerate(places) if other.depth < spot.depth]
        box, visible = _seen(i, nearer, sprites, frames)
        if visible < LEAST_VISIBLE * sprites[i].pixels:
            return None
        objects.append(
            SceneObject(
                a.shape,
                a.colour,
                a.size,
                spot.x,
                ground(spot.depth),
                spot.depth,
                frames[i],
                box,
                sprites[i].pixels,
                visible,
            )
        )
    return tuple(objects)


def _seen(
    i: int, nearer: list[int], sprites: list[Sprite], frames: list[tuple[int, int, int]]
) -> tuple[tuple[int, int, int, int], int]:
    """Box and number of the pixels of object ``i`` that no nearer object covers."""
    left, top, side = frames[i]
    mask = None
    for j in nearer:
        x, y, other = frames[j]
        x0, y0 = max(left, x), max(top, y)
        x1, y1 = min(left + side, x + other), min(top + side, y + other)
        if x0 >= x1 or y0 >= y1:
            continue
        if mask is None:
            mask = sprites[i].mask.copy()
        mask[y0 - top : y1 - top, x0 - left : x1 - left] &= ~sprites[j].mask[y0 - y : y1 - y, x0 - x : x1 - x]
    if mask is None:
        x0, y0, x1, y1 = sprites[i].box
        return (left + x0, top + y0, left + x1, top + y1), sprites[i].pixels
    visible = int(mask.sum())
    if not visible:
        return (left, top, left, top), 0
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1)
    return box, visible
