"""What is true about a picture: objects, a sign, the bars of a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MARGIN = 0.06
"""Least difference in x (share of the picture) or depth (0 .. 1) that a question may be about."""

RELATIONS = ("left", "right", "front", "behind")
PLACES = ("left", "middle", "right")
_OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
_EDGES = (0.4, 0.6)  # left | middle | right thirds of the picture
_CLEAR = 0.03  # an object whose centre is nearer to an edge than this has no place


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape, colour, size: its attributes, by name.
        x: centre of the object, 0 (left) .. 1 (right) of the picture's width.
        y: where it stands on the floor, 0 (top) .. 1 (bottom) of the picture's height.
        depth: distance of that point, 0 (nearest) .. 1 (the wall).
        frame: left, top and side of the square that its sprite fills, in pixels.
        box: x0, y0, x1, y1 of its visible pixels; x1 and y1 are excluded.
        pixels: number of its pixels if nothing stood before it.
        visible: number of its pixels that are seen.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    depth: float
    frame: tuple[int, int, int]
    box: tuple[int, int, int, int]
    pixels: int
    visible: int

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as stored in ``meta["objects"]``."""
        return {
            "shape": self.shape,
            "colour": self.colour,
            "size": self.size,
            "x": round(self.x, 4),
            "y": round(self.y, 4),
            "depth": round(self.depth, 4),
            "box": list(self.box),
            "pixels": self.pixels,
            "visible": self.visible,
        }


@dataclass(frozen=True)
class Sign:
    """A board with a word on the wall behind all objects; ``x`` is its centre, 0 .. 1 of the width."""

    word: str
    x: float


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: its colour, its value (1 .. 9) and its box in pixels (x1, y1 excluded)."""

    colour: str
    value: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Facts:
    """All that questions, captions and pictures are made from. A chart has no objects and no sign."""

    objects: tuple[SceneObject, ...]
    sign: Sign | None = None
    bars: tuple[Bar, ...] = ()


def side(a: SceneObject, relation: str, b: SceneObject) -> int:
    """Whether ``a`` stands to the ``relation`` of ``b``: 1 yes, -1 no, 0 too close to say.

    ``front`` means nearer, ``behind`` farther.
    """
    gap = b.x - a.x if relation in ("left", "right") else b.depth - a.depth
    if abs(gap) < MARGIN:
        return 0
    return 1 if (gap > 0) == (relation in ("left", "front")) else -1


def opposite(relation: str) -> str:
    """The other end of the same axis."""
    return _OPPOSITE[relation]


def place(thing: SceneObject) -> str | None:
    """Third of the picture that the object's centre lies in, or None close to the border of two."""
    if any(abs(thing.x - edge) < _CLEAR for edge in _EDGES):
        return None
    return PLACES[sum(thing.x > edge for edge in _EDGES)]


def outermost(objects: Sequence[SceneObject], among: Sequence[int], relation: str) -> int | None:
    """Index of the object of ``among`` that stands to the ``relation`` of all others of them, or None."""
    best = [i for i in among if all(side(objects[i], relation, objects[j]) > 0 for j in among if j != i)]
    return best[0] if best else None
