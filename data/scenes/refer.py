"""Describing one object so that nothing else can be meant, and finding what a description means."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from .facts import RELATIONS, SceneObject, place, side
from .language import NOUN, PLACE, RELATION

_WEIGHT_OF_RELATION = 3  # relations are that many times as frequent as places in grounded descriptions
_KEEP = 0.8  # probability that a grounded description keeps an attribute that it might do without


@dataclass(frozen=True)
class Description:
    """What is said about an object; None where nothing is said. ``anchor`` goes with ``relation``."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    relation: str | None = None
    anchor: Description | None = None

    @property
    def noun_phrase(self) -> str:
        """Attributes and noun, without an article: ``large red cube``."""
        return " ".join(w for w in (self.size, self.colour, self.shape or NOUN) if w)

    @property
    def words(self) -> str:
        """Everything that is said, without an article: ``large cube to the left of the small red cone``."""
        text = self.noun_phrase
        if self.relation and self.anchor:
            text += f" {RELATION[self.relation]} {self.anchor.the}"
        if self.place:
            text += f" {PLACE[self.place]}"
        return text

    @property
    def the(self) -> str:
        """:attr:`words` with the definite article."""
        return f"the {self.words}"

    def fits(self, thing: SceneObject) -> bool:
        """Whether shape, colour and size agree."""
        return (
            (self.shape is None or self.shape == thing.shape)
            and (self.colour is None or self.colour == thing.colour)
            and (self.size is None or self.size == thing.size)
        )

    def matches(self, objects: Sequence[SceneObject]) -> list[int] | None:
        """Indices of the objects that agree with all that is said.

        None where that is not clear: the anchor does not denote one object, or an object with the right
        attributes stands too close to the border of a place, or too close to the anchor, to say on which side
        it is.
        """
        found = [i for i, thing in enumerate(objects) if self.fits(thing)]
        if self.place:
            places = [place(objects[i]) for i in found]
            if None in places:
                return None
            found = [i for i, p in zip(found, places, strict=True) if p == self.place]
        if self.relation and self.anchor:
            anchor = self.anchor.resolve(objects)
            if anchor is None:
                return None
            sides = [side(objects[i], self.relation, objects[anchor]) if i != anchor else -1 for i in found]
            if 0 in sides:
                return None
            found = [i for i, s in zip(found, sides, strict=True) if s > 0]
        return found

    def resolve(self, objects: Sequence[SceneObject]) -> int | None:
        """Index of the one object that is meant, or None when it is none, several or unclear."""
        found = self.matches(objects)
        return found[0] if found is not None and len(found) == 1 else None


@lru_cache(256)
def named(shape: str | None, colour: str | None, size: str | None) -> Description:
    """Description by attributes alone; few exist, so each is made once."""
    return Description(shape, colour, size)


def full(thing: SceneObject) -> Description:
    """Size, colour and shape."""
    return named(thing.shape, thing.colour, thing.size)


def anchors(objects: Sequence[SceneObject], but: int | None = None) -> list[int]:
    """Indices of the objects that size, colour and shape tell from all others, except ``but``."""
    kinds = [(o.shape, o.colour, o.size) for o in objects]
    return [i for i, kind in enumerate(kinds) if i != but and kinds.count(kind) == 1]


def by_attributes(
    style: str, objects: Sequence[SceneObject], target: int, hide: str | None = None
) -> Description | None:
    """Description of ``target`` by its attributes except ``hide``; None when they do not single it out.

    Thin descriptions say as little as possible, in the order shape, colour, size; grounded ones say
    everything.
    """
    names = [name for name in ("shape", "colour", "size") if name != hide]
    least = len(names) if style == "grounded" else 1
    for length in range(least, len(names) + 1):
        for chosen in combinations(names, length):
            description = _say(objects[target], chosen)
            if description.resolve(objects) == target:
                return description
    return None


def describe(
    rng: random.Random, style: str, objects: Sequence[SceneObject], target: int, hide: str
) -> Description | None:
    """Description of ``target`` that does not name its attribute ``hide``; None when there is no clear one.

    A grounded description adds where the object stands: by an anchor (another object, with all its
    attributes) or, more rarely, by a third of the picture.
    """
    if style == "thin":
        return by_attributes(style, objects, target, hide)
    thing = objects[target]
    names = [n for n in ("shape", "colour", "size") if n != hide and (n == "shape" or rng.random() < _KEEP)]
    if not names:
        names = ["colour"]
    plain = _say(thing, names)
    ways: list[tuple[float, str, int]] = []
    for i in anchors(objects, but=target):
        for relation in RELATIONS:
            if side(thing, relation, objects[i]) > 0:
                ways.append((rng.random() / _WEIGHT_OF_RELATION, relation, i))
    where = place(thing)
    if where:
        ways.append((rng.random(), where, -1))
    for _, how, i in sorted(ways):
        if i < 0:
            description = Description(plain.shape, plain.colour, plain.size, how)
        else:
            description = Description(plain.shape, plain.colour, plain.size, None, how, full(objects[i]))
        if description.resolve(objects) == target:
            return description
    return by_attributes(style, objects, target, hide)


def _say(thing: SceneObject, names: Sequence[str]) -> Description:
    return named(*(getattr(thing, n) if n in names else None for n in ("shape", "colour", "size")))
