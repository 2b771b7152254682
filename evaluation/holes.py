"""Holes in pictures: areas painted over, and equal areas elsewhere."""

from __future__ import annotations

import io
from collections.abc import Hashable, Sequence

import numpy as np
from PIL import Image

from ..data.schema import stable_hash

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are excluded."""

FILLS = ("border", "grey")
"""Mean colour of the pixels around a hole, or mid-grey."""
AROUND = 2
"""Pixels of that border."""
GREY = 128


def covered(boxes: Sequence[Box], size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool: pixels of a picture of ``size`` (width, height) that lie in a box."""
    mask = np.zeros(size[::-1], bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def area(boxes: Sequence[Box]) -> int:
    """Pixels that boxes cover together."""
    return int(covered(boxes, (max(b[2] for b in boxes), max(b[3] for b in boxes))).sum())


def painted(encoded: bytes, boxes: Sequence[Box], fill: str = "border") -> bytes:
    """A picture with boxes painted over, as PNG; boxes that overlap or touch are one hole of one colour.

    Args:
        encoded: the picture.
        boxes: within it.
        fill: one of ``FILLS``; ``border`` takes no pixel of any hole, and the whole picture's mean where a hole leaves no
            border.
    """
    with Image.open(io.BytesIO(encoded)) as picture:
        pixels = np.array(picture.convert("RGB"))
    size = (pixels.shape[1], pixels.shape[0])
    everything, out = covered(boxes, size), pixels.copy()
    for together in groups(boxes):
        colour = np.full(3, GREY, np.uint8)
        if fill == "border":
            wider = [
                (max(0, a - AROUND), max(0, b - AROUND), c + AROUND, d + AROUND) for a, b, c, d in together
            ]
            border = covered(wider, size) & ~everything
            seen = pixels[border] if border.any() else pixels.reshape(-1, 3)
            colour = np.rint(seen.mean(0)).astype(np.uint8)
        out[covered(together, size)] = colour
    buffer = io.BytesIO()
    Image.fromarray(out).save(buffer, "PNG")
    return buffer.getvalue()


def groups(boxes: Sequence[Box]) -> list[list[Box]]:
    """Boxes that overlap or touch, directly or through others, together."""
    found: list[list[Box]] = []
    for box in boxes:
        near = [g for g in found if any(_meet(box, other, touching=True) for other in g)]
        found = [g for g in found if g not in near]
        found.append([*(b for g in near for b in g), box])
    return found


def _meet(a: Box, b: Box, touching: bool = False) -> bool:
    more = int(touching)
    return a[0] < b[2] + more and b[0] < a[2] + more and a[1] < b[3] + more and b[1] < a[3] + more


def places_elsewhere(
    boxes: Sequence[Box], size: tuple[int, int], key: Sequence[Hashable]
) -> tuple[Box, ...] | None:
    """Boxes moved to where they overlap none of the old ones and none of each other; None: there is no room.

    Every possible place is as likely; which it is depends on ``key`` alone.

    Args:
        boxes: in a picture.
        size: (width, height) of it.
        key: what names the choice (sample, exchange).
    """
    taken, moved = list(boxes), []
    for number, together in enumerate(groups(boxes)):
        left, top = min(b[0] for b in together), min(b[1] for b in together)
        right, bottom = max(b[2] for b in together), max(b[3] for b in together)
        # Shift of the whole group, counted from the one that brings it into the upper left corner.
        free = np.ones((size[1] - (bottom - top) + 1, size[0] - (right - left) + 1), bool)
        for a in together:
            for b in taken:
                across = _shifts(a[0] - left, a[2] - left, b[0], b[2])
                down = _shifts(a[1] - top, a[3] - top, b[1], b[3])
                free[down, across] = False
        places = np.flatnonzero(free)
        if not len(places):
            return None
        y, x = divmod(int(places[stable_hash("occlusion", *key, number) % len(places)]), free.shape[1])
        new = [(a[0] - left + x, a[1] - top + y, a[2] - left + x, a[3] - top + y) for a in together]
        taken += new
        moved += new
    return tuple(moved)


def _shifts(start: int, end: int, from_: int, to: int) -> slice:
    """Shifts with which the stretch ``start .. end`` overlaps ``from_ .. to``."""
    return slice(max(0, from_ - end + 1), max(0, to - start))
