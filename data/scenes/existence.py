"""Yes/no questions for existence, and the three ways to choose what is not there (POPE, arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .config import COLOURS, SHAPES, SIZES
from .facts import PLACES, RELATIONS, Facts, place, side
from .language import EXISTS, a
from .questions import Answer, Context, Question
from .refer import Description, anchors, full

_PLAIN = 0.2
"""Share of grounded questions without an anchor or a place: the form of the ``exists_*`` splits."""

Pair = tuple[str, str]
"""(colour, shape)."""


def exists(ctx: Context, wanted: str | None = None) -> Question | None:
    """Kind ``exists``, answered ``wanted`` (``yes`` or ``no``; None: either, with equal probability).

    What is absent is drawn from the law that the scene was drawn from, or is there but on the other side, so
    that neither the named pair nor the named place gives the answer away.
    """
    wanted = wanted or ctx.rng.choice(("yes", "no"))
    if ctx.style == "grounded" and ctx.rng.random() < _PLAIN:
        ctx = replace(ctx, style="thin")
    for _ in range(8):
        said = _present(ctx) if wanted == "yes" else _absent(ctx)
        if said is None:
            continue
        found = said.matches(ctx.objects)
        if found is not None and bool(found) == (wanted == "yes"):
            return _question(ctx, said)
    return None


def _question(ctx: Context, said: Description) -> Question:
    def solve(facts: Facts) -> Answer | None:
        found = said.matches(facts.objects)
        return None if found is None else Answer("yes" if found else "no", tuple(found))

    return Question("exists", ctx.rng.choice(EXISTS).format(one=a(said.words)), solve)


def _present(ctx: Context) -> Description | None:
    i = ctx.rng.randrange(len(ctx.objects))
    thing = ctx.objects[i]
    size = thing.size if ctx.rng.random() < 0.5 else None
    if ctx.style == "thin":
        return Description(thing.shape, thing.colour)
    candidates = anchors(ctx.objects, but=i)
    if not candidates:
        return Description(thing.shape, thing.colour, size, place(thing))
    anchor = ctx.rng.choice(candidates)
    relation = ctx.rng.choice([r for r in RELATIONS if side(thing, r, ctx.objects[anchor]) > 0])
    return _beside(ctx, Description(thing.shape, thing.colour, size), relation, anchor)


def _absent(ctx: Context) -> Description | None:
    thing = ctx.rng.choice(ctx.objects)
    here = place(thing)
    elsewhere = ctx.style == "grounded" and ctx.rng.random() < 0.4
    anchor, relation, where = None, ctx.rng.choice(RELATIONS), None
    rivals = len(ctx.objects)
    if ctx.style == "grounded":
        candidates = anchors(ctx.objects) if len(ctx.objects) > 1 else []
        if candidates:
            anchor = ctx.rng.choice(candidates)
            rivals = sum(side(o, relation, ctx.objects[anchor]) > 0 for o in ctx.objects)
        else:
            elsewhere = elsewhere and here is not None
            where = ctx.rng.choice([p for p in PLACES if p != here]) if elsewhere else here
    shape, colour = (thing.shape, thing.colour) if elsewhere else _missing(ctx, rivals)
    size = ctx.rng.choice((None, None, *SIZES)) if ctx.style == "grounded" else None
    said = Description(shape, colour, size and thing.size if elsewhere else size, where)
    return said if anchor is None else _beside(ctx, said, relation, anchor)


def _missing(ctx: Context, rivals: int) -> tuple[str, str]:
    """Shape and colour that are likely, but not for being absent.

    A frequent pair is seldom absent, so "no" would go with rare pairs. Drawing a pair in inverse proportion
    to its chance of being absent among ``rivals`` objects takes that back.
    """
    while True:
        shape = ctx.law.shape(ctx.rng, None)
        colour = ctx.law.colour(ctx.rng, shape)
        present = ctx.law.chance(colour, shape)
        if ctx.rng.random() < ((1 - ctx.law.most) / (1 - present)) ** rivals:
            return shape, colour


def _beside(ctx: Context, said: Description, relation: str, anchor: int) -> Description | None:
    if said.fits(ctx.objects[anchor]):  # "a red cone behind the small red cone" would more often be a "no"
        return None
    return Description(said.shape, said.colour, said.size, None, relation, full(ctx.objects[anchor]))


def absent_random(ctx: Context) -> list[Pair]:
    """Pairs that ``train`` shows and this scene does not."""
    seen = {(o.colour, o.shape) for o in ctx.objects} | ctx.world.held_out
    return [(c, s) for s in SHAPES for c in COLOURS if (c, s) not in seen]


def absent_popular(ctx: Context) -> list[Pair]:
    """Of those, the most frequent ones of ``train``: each shape in its prior colour."""
    return [(c, s) for c, s in absent_random(ctx) if ctx.world.prior[s] == c]


def absent_adversarial(ctx: Context) -> list[Pair]:
    """Of those, the ones whose shape goes along with a shape of this scene in ``train``."""
    here = {o.shape for o in ctx.objects}
    with_them = {ctx.world.companion[s] for s in here} | {s for s in SHAPES if ctx.world.companion[s] in here}
    return [(c, s) for c, s in absent_popular(ctx) if s in with_them]


def pope(ctx: Context, negatives: Callable[[Context], list[Pair]], limit: int) -> list[Question]:
    """At most ``limit`` questions like "is there a red cube?", as many answered yes as no, in random order.

    Fewer where ``negatives`` gives fewer pairs; where it gives none, a popular or a random one serves.
    """
    present = sorted({(o.colour, o.shape) for o in ctx.objects})
    absent = negatives(ctx) or ctx.rng.sample(absent_popular(ctx) or absent_random(ctx), 1)
    rounds = min(max(1, limit // 2), len(present), len(absent))
    pairs = ctx.rng.sample(present, rounds) + ctx.rng.sample(absent, rounds)
    ctx.rng.shuffle(pairs)
    return [_question(ctx, Description(shape, colour)) for colour, shape in pairs]
