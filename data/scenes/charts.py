"""Bar charts: their facts and the questions about them, all of kind ``chart``."""

from __future__ import annotations

import random
from collections.abc import Callable

from .config import COLOURS
from .facts import Bar, Facts
from .language import (
    CHART_BESIDE,
    CHART_COLOUR,
    CHART_COMPARE,
    CHART_COUNT,
    CHART_OUTERMOST,
    CHART_VALUE,
)
from .picture import bar_boxes
from .questions import Answer, Question

FEWEST, MOST, HIGHEST = 2, 5, 9


def bars(rng: random.Random, size: int) -> tuple[Bar, ...]:
    """Two to five bars of different colours and different values, 1 .. 9."""
    n = rng.randint(FEWEST, MOST)
    values = rng.sample(range(1, HIGHEST + 1), n)
    return tuple(map(Bar, rng.sample(COLOURS, n), values, bar_boxes(size, values)))


def chart_questions(rng: random.Random, drawn: tuple[Bar, ...], limit: int) -> list[Question]:
    """At most ``limit`` questions with different words; none is answered by another one's words."""
    makers = [_outermost, _value, _beside, _count, _compare]
    asked: dict[str, Question] = {}
    for make in [*rng.sample(makers, len(makers)), _value, _beside, _compare]:
        if len(asked) < limit:
            question = make(rng, drawn)
            asked.setdefault(question.text, question)
    return list(asked.values())


def _ask(text: str, find: Callable[[dict[str, Bar]], str]) -> Question:
    def solve(facts: Facts) -> Answer | None:
        try:
            return Answer(find({bar.colour: bar for bar in facts.bars}), None) if facts.bars else None
        except (KeyError, IndexError):
            return None

    return Question("chart", text, solve)


def _outermost(rng: random.Random, drawn: tuple[Bar, ...]) -> Question:
    which, best = rng.choice((("tallest", max), ("shortest", min)))
    text = rng.choice(CHART_OUTERMOST).format(which=which)
    return _ask(text, lambda bars: best(bars.values(), key=lambda bar: bar.value).colour)


def _value(rng: random.Random, drawn: tuple[Bar, ...]) -> Question:
    colour = rng.choice(drawn).colour
    return _ask(rng.choice(CHART_VALUE).format(colour=colour), lambda bars: str(bars[colour].value))


def _beside(rng: random.Random, drawn: tuple[Bar, ...]) -> Question:
    i = rng.randrange(len(drawn) - 1)
    side, colour, step = rng.choice((("right", drawn[i].colour, 1), ("left", drawn[i + 1].colour, -1)))
    wordings, name = rng.choice(((CHART_BESIDE, "value"), (CHART_COLOUR, "colour")))

    def find(bars: dict[str, Bar]) -> str:
        order = sorted(bars, key=lambda c: bars[c].box[0])
        at = order.index(colour) + step if colour in order else -1
        return str(getattr(bars[order[at] if at >= 0 else ""], name))

    return _ask(rng.choice(wordings).format(side=side, colour=colour), find)


def _count(rng: random.Random, drawn: tuple[Bar, ...]) -> Question:
    return _ask(rng.choice(CHART_COUNT), lambda bars: str(len(bars)))


def _compare(rng: random.Random, drawn: tuple[Bar, ...]) -> Question:
    one, other = (bar.colour for bar in rng.sample(drawn, 2))
    text = rng.choice(CHART_COMPARE).format(a=one, b=other)
    return _ask(text, lambda bars: "taller" if bars[one].value > bars[other].value else "shorter")
