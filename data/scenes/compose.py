"""One scene with its questions: facts drawn from a law, then asked about."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...models.errors import UserError
from .charts import bars, chart_questions
from .config import SceneConfig
from .counting import PLANNERS, attributes, count, unplanned
from .existence import exists
from .facts import Facts, Sign
from .language import WORDS
from .layout import Attributes, Spot, spots, stand
from .picture import Scene
from .questions import Answer, Context, Question, attribute, comparison, selection, sign, two_hop
from .sprites import BACKDROPS
from .world import Law, World

ATTEMPTS = 200
"""How often a scene is drawn anew before the settings are called impossible."""

MAKERS: dict[str, Callable[[Context], Question | None]] = {
    "colour": lambda ctx: attribute(ctx, "colour"),
    "shape": lambda ctx: attribute(ctx, "shape"),
    "size": lambda ctx: attribute(ctx, "size"),
    "exists": exists,
    "selection": selection,
    "comparison": comparison,
    "sign": sign,
    "two_hop": two_hop,
    "count": lambda ctx: unplanned(ctx, "count"),
    "negated_count": lambda ctx: unplanned(ctx, "negated_count"),
}
"""Kind -> function that asks about a scene as it is. Charts have their own."""


@dataclass(frozen=True)
class Exchange:
    """A question and its answer in one scene."""

    question: Question
    answer: Answer


@dataclass(frozen=True)
class Draft:
    """A scene and what is asked about it; ``pair`` and ``fact`` are set in ``minimal_pairs`` only."""

    scene: Scene
    exchanges: tuple[Exchange, ...]
    pair: int | None = None
    fact: str | None = None


@dataclass(frozen=True)
class Plain:
    """Attributes and spots of the objects, and what else is in the scene: all but the pixels."""

    attributes: tuple[Attributes, ...]
    spots: tuple[Spot, ...]
    sign: Sign | None
    backdrop: int

    def stand(self, config: SceneConfig) -> Scene | None:
        """The scene, or None when an object would be hidden by more than half."""
        objects = stand(config, self.attributes, self.spots)
        return None if objects is None else Scene(objects, self.sign, (), config.size, self.backdrop)


def plain(rng: random.Random, config: SceneConfig, law: Law, n: int) -> Plain:
    """``n`` objects drawn from ``law``, by chance with a sign."""
    return Plain(
        attributes(rng, law, [None] * n), tuple(spots(rng, n)), hang(rng, config), rng.randrange(BACKDROPS)
    )


def hang(rng: random.Random, config: SceneConfig, kinds: Sequence[str] = ()) -> Sign | None:
    """A sign with a random word, or none; always one where ``kinds`` asks for nothing else."""
    if rng.random() < config.sign or set(kinds) == {"sign"}:
        return Sign(rng.choice(WORDS), rng.uniform(0.25, 0.75))
    return None


def answered(question: Question, facts: Facts) -> Exchange:
    """The question with its answer in the scene that it was made for."""
    answer = question.solve(facts)
    assert answer is not None, question.text
    return Exchange(question, answer)


def attempts(make: Callable[[], Draft | None], what: str) -> Draft:
    """Call ``make`` until it gives a draft.

    Raises:
        UserError: it never does, as the settings leave nothing to ask.
    """
    for _ in range(ATTEMPTS):
        draft = make()
        if draft is not None:
            return draft
    raise UserError(f"no scene can be asked about {what}: more objects, or other kinds, are needed")


def free(rng: random.Random, config: SceneConfig, law: Law, world: World, kinds: Sequence[str]) -> Draft:
    """A scene drawn from ``law``, with at most ``config.questions`` questions, different kinds first."""
    if "chart" in kinds and (len(kinds) == 1 or rng.random() < config.charts):
        scene = Scene((), None, bars(rng, config.size), config.size)
        asked = chart_questions(rng, scene.bars, config.questions)
        return Draft(scene, tuple(answered(q, scene) for q in asked))
    rest = [k for k in kinds if k != "chart"]
    return attempts(
        lambda: _free(rng, config, law, world, rest), f"{', '.join(rest)} with {config.objects} objects"
    )


def _free(
    rng: random.Random, config: SceneConfig, law: Law, world: World, kinds: Sequence[str]
) -> Draft | None:
    order = rng.sample(kinds, len(kinds))
    planned = next((k for k in order[: config.questions] if k in PLANNERS), None)
    plan = PLANNERS[planned](rng, config, law) if planned else None
    n = plan.objects if plan else rng.randint(*config.objects)
    places = spots(rng, n)
    anchor, wanted = plan.arrange(rng, places) if plan else (None, [None] * n)
    drawn = attributes(rng, law, wanted, plan)
    scene = Plain(drawn, tuple(places), hang(rng, config, kinds), rng.randrange(BACKDROPS)).stand(config)
    if scene is None:
        return None
    ctx = Context(rng, config.style, scene, law, world)
    asked: dict[str, Question] = {}

    def ask(question: Question | None) -> None:
        if question is not None:
            asked.setdefault(question.text, question)

    if plan and planned:
        question = count(ctx, planned, plan.counted, anchor)
        if question is None:  # the anchor has a double
            return None
        ask(question)
    elif planned:
        ask(unplanned(ctx, planned))
    for again in range(2):
        for kind in order:
            if len(asked) < config.questions and (kind not in PLANNERS or (again and law.skewed)):
                ask(MAKERS[kind](ctx))
    exchanges = [answered(q, scene) for q in asked.values()]
    rng.shuffle(exchanges)
    return Draft(scene, tuple(exchanges)) if exchanges else None
