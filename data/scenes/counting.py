"""Counting questions, planned before the scene so that every answer is equally likely given the question's
words.

In a scene drawn freely "how many cubes are there?" is answered well by "0". So the question comes first: its
words, then its answer, then the number of objects, then objects that agree.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .config import COLOURS, SHAPES, SIZES, SceneConfig
from .facts import RELATIONS, Facts, side
from .language import COUNT_ALL, COUNT_NOT, COUNT_SIDE, NOUN, RELATION, things
from .layout import Attributes, Spot
from .questions import Answer, Context, Question
from .refer import Description, anchors, by_attributes, full
from .world import Law

_VALUES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
_MOST = 3
_FROM_SCENE = 0.6  # probability that an unplanned question names a value that is to be seen


@dataclass(frozen=True)
class Counted:
    """What is counted: objects that have ``of``, have not ``without`` and stand to the ``relation`` of
    another one.

    ``of`` and ``without`` are (attribute, value).
    """

    of: tuple[str, str] | None = None
    without: tuple[str, str] | None = None
    relation: str | None = None

    def holds(self, thing: object) -> bool:
        """Whether the object's attributes are those counted, wherever it stands."""
        return (self.of is None or getattr(thing, self.of[0]) == self.of[1]) and (
            self.without is None or getattr(thing, self.without[0]) != self.without[1]
        )

    @property
    def things(self) -> str:
        """Plural noun phrase: ``cubes``, ``red objects``."""
        if self.of is None:
            return things([NOUN])
        return things([self.of[1]] if self.of[0] == "shape" else [self.of[1], NOUN])


@dataclass(frozen=True)
class Plan:
    """A counting question and its answer, for a scene of ``objects`` objects that is yet to be made."""

    counted: Counted
    number: int
    objects: int

    def arrange(self, rng: random.Random, spots: Sequence[Spot]) -> tuple[int | None, list[bool | None]]:
        """Index of the anchor (None: no relation), and for each spot whether its object is to be counted.

        None instead of a bool leaves the object free: it stands on the anchor's other side.
        """
        relation = self.counted.relation
        if relation is None:
            chosen = rng.sample(range(len(spots)), self.number)
            return None, [i in chosen for i in range(len(spots))]
        ahead = sorted(
            range(len(spots)), key=lambda i: spots[i].x if relation in ("left", "right") else spots[i].depth
        )
        if relation in ("right", "behind"):
            ahead.reverse()
        # An anchor with enough objects ahead of it; exactly enough where everything ahead counts.
        rank = self.number if self.counted.of is None else rng.randint(self.number, len(spots) - 1)
        chosen = rng.sample(ahead[:rank], self.number)
        return ahead[rank], [(i in chosen) if i in ahead[:rank] else None for i in range(len(spots))]


def plan_count(rng: random.Random, config: SceneConfig, law: Law) -> Plan | None:
    """Plan a question of kind ``count``; None where that would bend colours: then take :func:`unplanned`."""
    low, high = config.objects
    attributes = ("size", "shape", "colour")
    if config.style == "grounded" and high > 1:
        family = rng.choices(("all", "attribute", "relation"), (1, 3, 6))[0]
    else:
        family = rng.choices(("all", "attribute"), (1, 4))[0]
    if family == "all":
        n = rng.randint(low, high)
        return Plan(Counted(), n, n)
    name = rng.choice(attributes)
    if name == "colour" and law.skewed:
        return None
    of = (name, rng.choice(_VALUES[name]))
    if family == "attribute":
        number = rng.randint(0, min(high, _MOST))
        return Plan(Counted(of), number, rng.randint(max(low, number), high))
    number = rng.randint(0, min(high - 1, _MOST))
    counted = Counted(None if rng.random() < 0.25 else of, relation=rng.choice(RELATIONS))
    return Plan(counted, number, rng.randint(max(low, number + 1, 2), high))


def plan_negated(rng: random.Random, config: SceneConfig, law: Law) -> Plan | None:
    """Plan a question of kind ``negated_count``, as :func:`plan_count` does."""
    low, high = config.objects
    name = rng.choice(("size", "shape", "colour"))
    if name == "colour" and law.skewed:
        return None
    without = (name, rng.choice(_VALUES[name]))
    of = ("shape", rng.choice(SHAPES)) if name != "shape" and rng.random() < 0.5 else None
    number = rng.randint(0, min(high, _MOST))
    return Plan(Counted(of, without), number, rng.randint(max(low, number), high))


PLANNERS = {"count": plan_count, "negated_count": plan_negated}


def attributes(
    rng: random.Random, law: Law, wanted: Sequence[bool | None], plan: Plan | None = None
) -> tuple[Attributes, ...]:
    """Draw one object after the other; where ``wanted`` says so, until ``plan`` counts it, or does not."""
    drawn: list[Attributes] = []
    for want in wanted:
        tries = 0
        while True:
            # A companion that the plan forbids is given up after a few draws.
            shape = law.shape(rng, drawn[-1].shape if drawn and tries < 4 else None)
            one = Attributes(shape, law.colour(rng, shape), rng.choice(SIZES))
            if plan is None or want is None or plan.counted.holds(one) == want:
                drawn.append(one)
                break
            tries += 1
    return tuple(drawn)


def count(ctx: Context, kind: str, counted: Counted, anchor: int | None) -> Question | None:
    """Question for the number of ``counted`` objects, from object ``anchor`` where there is a relation."""
    described: Description | None = None
    if anchor is not None:
        described = (
            full(ctx.objects[anchor])
            if ctx.style == "grounded"
            else by_attributes("thin", ctx.objects, anchor)
        )
        if described is None or described.resolve(ctx.objects) != anchor:
            return None

    def solve(facts: Facts) -> Answer | None:
        found = [i for i, thing in enumerate(facts.objects) if counted.holds(thing)]
        if counted.relation and described:
            at = described.resolve(facts.objects)
            if at is None:
                return None
            sides = {i: side(facts.objects[i], counted.relation, facts.objects[at]) for i in found if i != at}
            if 0 in sides.values():
                return None
            found = [i for i, where in sides.items() if where > 0]
        return Answer(str(len(found)), tuple(found))

    if counted.without:
        name, value = counted.without
        what = things([value]) if name == "shape" else value
        text = ctx.rng.choice(COUNT_NOT).format(things=counted.things, what=what)
    elif counted.relation and described:
        where = f"{RELATION[counted.relation]} {described.the}"
        text = ctx.rng.choice(COUNT_SIDE).format(things=counted.things, where=where)
    else:
        text = ctx.rng.choice(COUNT_ALL).format(things=counted.things)
    return Question(kind, text, solve)


def unplanned(ctx: Context, kind: str) -> Question | None:
    """Counting question about a scene as it is; under a skewed law always about a colour."""
    name = "colour" if ctx.law.skewed else ctx.rng.choice(tuple(_VALUES))
    if ctx.rng.random() < _FROM_SCENE:
        value = getattr(ctx.rng.choice(ctx.objects), name)
    else:
        value = ctx.rng.choice(_VALUES[name])
    if kind == "negated_count":
        of = (
            ("shape", ctx.rng.choice(ctx.objects).shape)
            if name != "shape" and ctx.rng.random() < 0.5
            else None
        )
        if (
            ctx.law.skewed and of and (value, of[1]) in ctx.world.held_out
        ):  # what train never shows, it never names
            of = None
        return count(ctx, kind, Counted(of, without=(name, value)), None)
    candidates = anchors(ctx.objects) if ctx.style == "grounded" and len(ctx.objects) > 1 else []
    if candidates and ctx.rng.random() < 0.6:
        return count(
            ctx, kind, Counted((name, value), relation=ctx.rng.choice(RELATIONS)), ctx.rng.choice(candidates)
        )
    return count(ctx, kind, Counted((name, value)), None)
