"""Questions about one scene, one function a kind: attribute, selection, comparison, sign, two hops.

Each function takes a :class:`Context` and gives a :class:`Question`, or None where the scene has no such
question with one clear answer. Counting is in ``counting.py``, existence in ``existence.py``, charts in
``charts.py``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .facts import RELATIONS, Facts, SceneObject, outermost, side
from .language import (
    ATTRIBUTE_QUESTIONS,
    COMPARE_DEPTH,
    COMPARE_X,
    SIGN,
    SIGN_BEHIND,
    SUPERLATIVE,
)
from .refer import Description, anchors, by_attributes, describe, full
from .world import Law, World

ATTRIBUTES = ("colour", "shape", "size")


@dataclass(frozen=True)
class Answer:
    """Text of an answer, and the indices of the objects that it is about (None: the whole picture)."""

    text: str
    asked: tuple[int, ...] | None


@dataclass(frozen=True)
class Question:
    """A question as words and as a function of facts.

    Attributes:
        kind: one of ``KINDS``.
        text: the question, without a format prompt.
        solve: facts of any scene -> the answer there; None where the question presupposes what is not so.
        prior: what somebody who knows ``train`` but sees no picture would answer, where that follows from the
            named shape or colour.
    """

    kind: str
    text: str
    solve: Callable[[Facts], Answer | None]
    prior: str | None = None


@dataclass(frozen=True)
class Context:
    """What a question is made from; ``law`` says what is plausible to ask for in vain."""

    rng: random.Random
    style: str
    facts: Facts
    law: Law
    world: World

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """Objects of the scene."""
        return self.facts.objects


def ask_attribute(
    ctx: Context, kind: str, name: str, text: str, find: Callable[[Facts], int | None], said: Description
) -> Question:
    """Question for attribute ``name`` of the object that ``find`` gives; ``said`` is what ``text`` names."""

    def solve(facts: Facts) -> Answer | None:
        i = find(facts)
        return None if i is None else Answer(getattr(facts.objects[i], name), (i,))

    prior = None
    if name == "colour" and said.shape:
        prior = ctx.world.prior[said.shape]
    elif name == "shape" and said.colour:
        prior = ctx.world.prior_shape(said.colour)
    return Question(kind, text, solve, prior)


def attribute(ctx: Context, name: str, target: int | None = None) -> Question | None:
    """Kinds ``colour``, ``shape`` and ``size``: an attribute of one described object."""
    i = ctx.rng.randrange(len(ctx.objects)) if target is None else target
    said = describe(ctx.rng, ctx.style, ctx.objects, i, hide=name)
    if said is None:
        return None
    text = ctx.rng.choice(ATTRIBUTE_QUESTIONS[name]).format(it=said.the)
    return ask_attribute(ctx, name, name, text, lambda facts: said.resolve(facts.objects), said)


def selection(ctx: Context) -> Question | None:
    """Kind ``selection``: an attribute of the leftmost, rightmost, nearest or farthest of several objects."""
    if len(ctx.objects) < 2:
        return None
    name, relation = ctx.rng.choice(ATTRIBUTES), ctx.rng.choice(RELATIONS)
    groups = [Description()]
    if ctx.style == "grounded":
        for other in ATTRIBUTES:
            if other != name:
                groups += [Description(**{other: getattr(o, other)}) for o in ctx.objects]
        groups = [g for g in groups if len(g.matches(ctx.objects) or ()) > 1]
        groups = groups[1:] or groups  # narrowed to some of the objects where that leaves a choice
    said = ctx.rng.choice(groups)

    def find(facts: Facts) -> int | None:
        among = said.matches(facts.objects)
        return outermost(facts.objects, among, relation) if among and len(among) > 1 else None

    if find(ctx.facts) is None:
        return None
    text = ctx.rng.choice(ATTRIBUTE_QUESTIONS[name]).format(
        it=f"the {SUPERLATIVE[relation]} {said.noun_phrase}"
    )
    return ask_attribute(ctx, "selection", name, text, find, said)


def two_hop(ctx: Context) -> Question | None:
    """Kind ``two_hop``: an attribute of an object that is named only by where it stands from another one."""
    candidates = anchors(ctx.objects)
    if len(ctx.objects) < 2 or not candidates:
        return None
    i = ctx.rng.choice(candidates)
    anchor = full(ctx.objects[i]) if ctx.style == "grounded" else by_attributes("thin", ctx.objects, i)
    ways = [Description(relation=relation, anchor=anchor) for relation in RELATIONS]
    ways = [d for d in ways if d.resolve(ctx.objects) is not None]
    if not ways:
        return None
    said, name = ctx.rng.choice(ways), ctx.rng.choice(ATTRIBUTES)
    text = ctx.rng.choice(ATTRIBUTE_QUESTIONS[name]).format(it=said.the)
    return ask_attribute(ctx, "two_hop", name, text, lambda facts: said.resolve(facts.objects), said)


def comparison(ctx: Context) -> Question | None:
    """Kind ``comparison``: which of two described objects is further left, or nearer."""
    if len(ctx.objects) < 2:
        return None
    i, j = ctx.rng.sample(range(len(ctx.objects)), 2)
    one = by_attributes(ctx.style, ctx.objects, i)
    other = by_attributes(ctx.style, ctx.objects, j)
    if one is None or other is None:
        return None
    wordings, relation, yes, no = ctx.rng.choice(
        ((COMPARE_X, "left", "left", "right"), (COMPARE_DEPTH, "front", "nearer", "farther"))
    )

    def solve(facts: Facts) -> Answer | None:
        a, b = one.resolve(facts.objects), other.resolve(facts.objects)
        if a is None or b is None:
            return None
        where = side(facts.objects[a], relation, facts.objects[b])
        return Answer(yes if where > 0 else no, (a, b)) if where else None

    return Question("comparison", ctx.rng.choice(wordings).format(a=one.the, b=other.the), solve)


def sign(ctx: Context) -> Question | None:
    """Kind ``sign``: the word on the sign; grounded questions say what stands before it."""
    if ctx.facts.sign is None:
        return None
    wordings, described = SIGN, {}
    front: Description | None = None
    if ctx.style == "grounded":
        candidates = anchors(ctx.objects)
        if candidates:
            front = full(ctx.objects[ctx.rng.choice(candidates)])
            wordings, described = SIGN_BEHIND, {"it": front.the}

    def solve(facts: Facts) -> Answer | None:
        if facts.sign is None or (front is not None and front.resolve(facts.objects) is None):
            return None
        return Answer(facts.sign.word, None)

    return Question("sign", ctx.rng.choice(wordings).format(**described), solve)
