"""Captions of scenes against their facts: what is named rightly, what is left out, what is made up.

Numbers are pooled over captions, with standard errors that take captions (not mentions)
for independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.scenes.facts import SceneObject, place, side
from .base import Measure, share
from .caption_reading import BAR, Said, Thing


@dataclass(frozen=True)
class Scene:
    """What there is.

    Attributes:
        objects: of the scene; none in a chart.
        things: objects and bars, as captions name them; objects come first.
        sign: word on the sign; None: there is none.
    """

    objects: tuple[SceneObject, ...]
    things: tuple[Thing, ...]
    sign: str | None


def scene_of(meta: Mapping[str, Any]) -> Scene:
    """The facts that ``data.scenes`` stores in ``meta``.

    Raises:
        KeyError, TypeError: ``meta`` is not that of a scene.
    """
    objects = tuple(SceneObject(**{**thing, "frame": (0, 0, 0)}) for thing in meta["objects"])
    bars = [Thing(BAR, bar["colour"], None, bar["value"]) for bar in meta.get("chart") or ()]
    return Scene(objects, (*(Thing(o.shape, o.colour, o.size) for o in objects), *bars), meta.get("sign"))


@dataclass(frozen=True)
class Compared:
    """A caption against its scene, in counts.

    Attributes:
        mentions: things that are named.
        right: mentions that agree with a thing of their own: two mentions of one thing are right once.
        found: things that are named with all that there is to them, each by a mention of its own.
        things: that there are.
        invented: mentions that agree with nothing in the picture.
        shapes, invented_shapes: mentions with a shape; those whose shape is not in the picture.
        relations, relations_right: statements where things stand, and those that hold. About things that are not there, or
            so close together that the generator would not say it either, nothing is counted.
        counts, counts_right: of statements like "3 objects".
        signs, signs_right: words said to be on a sign, and those that are.
        hung: 1 where there is a sign, else 0.
    """

    mentions: int
    right: int
    found: int
    things: int
    invented: int
    shapes: int
    invented_shapes: int
    relations: int
    relations_right: int
    counts: int
    counts_right: int
    signs: int
    signs_right: int
    hung: int

    @property
    def exact(self) -> bool:
        """Whether all is named, nothing is wrong and nothing is made up."""
        return (
            self.mentions == self.right
            and self.found == self.things
            and self.relations == self.relations_right
            and self.counts == self.counts_right
            and self.signs == self.signs_right
            and min(self.signs, 1) == self.hung
        )


def compare(said: Said, scene: Scene) -> Compared:
    """Count what a caption says rightly and wrongly."""
    agreeing = [[i for i, thing in enumerate(scene.things) if one.agrees(thing)] for one in said.things]
    shapes = [one.shape for one in said.things if one.shape is not None]
    there = {thing.shape for thing in scene.things}
    stated = [_holds_between(said.things, scene, *claim) for claim in said.relations]
    stated += [_holds_at(said.things, scene, *claim) for claim in said.places]
    checked = [holds for holds in stated if holds is not None]
    bars = sum(thing.shape == BAR for thing in scene.things)
    counted = [n == (bars if of_bars else len(scene.objects)) for n, of_bars in said.counts]
    return Compared(
        mentions=len(said.things),
        right=_matching(agreeing),
        found=_matching([row for one, row in zip(said.things, agreeing, strict=True) if one.whole]),
        things=len(scene.things),
        invented=sum(not row for row in agreeing),
        shapes=len(shapes),
        invented_shapes=sum(shape not in there for shape in shapes),
        relations=len(checked),
        relations_right=sum(checked),
        counts=len(counted),
        counts_right=sum(counted),
        signs=len(said.signs),
        signs_right=sum(word == scene.sign for word in said.signs),
        hung=int(scene.sign is not None),
    )


def _matching(choices: Sequence[Sequence[int]]) -> int:
    """How many of some mentions can each have a thing of their own (a largest bipartite matching)."""
    taken: dict[int, int] = {}

    def place_one(i: int, tried: set[int]) -> bool:
        for thing in choices[i]:
            if thing not in tried:
                tried.add(thing)
                if thing not in taken or place_one(taken[thing], tried):
                    taken[thing] = i
                    return True
        return False

    return sum(place_one(i, set()) for i in range(len(choices)))


def _holds_between(things: Sequence[Thing], scene: Scene, one: int, relation: str, other: int) -> bool | None:
    """Whether some two objects that are meant stand like that; None: none are there, or it is too close to say."""
    sides = [
        side(a, relation, b)
        for a, thing in zip(scene.objects, scene.things, strict=False)
        if things[one].agrees(thing)
        for b, thing_b in zip(scene.objects, scene.things, strict=False)
        if b is not a and things[other].agrees(thing_b)
    ]
    return _verdict([s > 0 if s else None for s in sides])


def _holds_at(things: Sequence[Thing], scene: Scene, one: int, where: str) -> bool | None:
    """Whether some object that is meant stands in that third; None likewise."""
    places = [place(a) for a, t in zip(scene.objects, scene.things, strict=False) if things[one].agrees(t)]
    return _verdict([None if found is None else found == where for found in places])


def _verdict(answers: Sequence[bool | None]) -> bool | None:
    if True in answers:
        return True
    return None if None in answers or not answers else False


def measures_of(compared: Sequence[Compared]) -> dict[str, Measure]:
    """All numbers of some captions.

    ``precision``, ``recall``, ``f1`` of things; ``chair_s`` (captions with a thing that is not there), ``chair_i``
    (mentions of such things) by all that is said of a thing, ``chair_s_shape`` and ``chair_i_shape`` by its shape alone;
    ``relations``, ``counts``, ``signs``: share of those said that are right; ``sign_recall``: of signs there are, those read;
    ``exact``: captions that name all and nothing wrongly. No value where nothing of the sort was said.
    """
    columns = {
        name: np.array([getattr(one, name) for one in compared], float)
        for name in Compared.__dataclass_fields__
    }
    precision = pooled(columns["right"], columns["mentions"])
    recall = pooled(columns["found"], columns["things"])
    return {
        "f1": _f1(columns, precision, recall),
        "precision": precision,
        "recall": recall,
        "chair_s": share(one.invented > 0 for one in compared),
        "chair_i": pooled(columns["invented"], columns["mentions"]),
        "chair_s_shape": share(one.invented_shapes > 0 for one in compared),
        "chair_i_shape": pooled(columns["invented_shapes"], columns["shapes"]),
        "relations": pooled(columns["relations_right"], columns["relations"]),
        "counts": pooled(columns["counts_right"], columns["counts"]),
        "signs": pooled(columns["signs_right"], columns["signs"]),
        "sign_recall": pooled(np.minimum(columns["signs_right"], 1) * columns["hung"], columns["hung"]),
        "exact": share(one.exact for one in compared),
    }


def pooled(parts: np.ndarray, wholes: np.ndarray) -> Measure:
    """Sum of ``parts`` by sum of ``wholes``, one of each a caption; ``n`` is the latter sum.

    The standard error is that of a ratio of sums over independent captions (linearised).
    """
    n = int(wholes.sum())
    if not n:
        return Measure(None, 0)
    value = float(parts.sum() / n)
    return Measure(value, n, _error((parts - value * wholes) / wholes.mean()))


def _error(effects: np.ndarray) -> float | None:
    """Standard error of a number from what each caption adds to it (effects of mean 0)."""
    count = len(effects)
    return None if count < 2 else math.sqrt(float((effects**2).sum()) / (count * (count - 1)))


def _f1(columns: Mapping[str, np.ndarray], precision: Measure, recall: Measure) -> Measure:
    """Harmonic mean; 0 where nothing is named although there is something."""
    n = recall.n
    if precision.value is None or recall.value is None:
        return Measure(0.0 if n else None, n)
    p, r = precision.value, recall.value
    if p + r == 0:
        return Measure(0.0, n)
    by_p = 2 * (r / (p + r)) ** 2 / columns["mentions"].mean() * (columns["right"] - p * columns["mentions"])
    by_r = 2 * (p / (p + r)) ** 2 / columns["things"].mean() * (columns["found"] - r * columns["things"])
    return Measure(2 * p * r / (p + r), n, _error(by_p + by_r))
