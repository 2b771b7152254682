"""A scene in words: captions, and the full description that stands in for the picture in text streams."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .facts import Facts, SceneObject, place, side
from .language import (
    CAPTION_CHART,
    CAPTION_DEPTH,
    CAPTION_ONE,
    CAPTION_PAIR,
    CAPTION_ROW,
    CAPTION_SIGN,
    FACTS_COUNT,
    FACTS_LIST,
    FACTS_ONE,
    FACTS_ORDER,
    ORDINALS,
    PLACE,
    RELATION,
    WAYS,
    a,
    joined,
    sentence,
)
from .refer import full


def caption(rng: random.Random, facts: Facts) -> str:
    """One or two sentences that name every object, the sign or all bars."""
    if facts.bars:
        return _chart(rng, facts)
    ones = [a(full(thing).noun_phrase) for thing in facts.objects]
    if len(ones) == 1:
        text = rng.choice(CAPTION_ONE).format(it=_placed(facts.objects[0]))
    elif len(ones) == 2 and rng.random() < 0.5:
        i = rng.randrange(2)
        here = [r for r in RELATION if side(facts.objects[i], r, facts.objects[1 - i]) > 0]
        text = rng.choice(CAPTION_PAIR).format(a=ones[i], where=RELATION[rng.choice(here)], b=ones[1 - i])
    else:
        wordings, way = rng.choice(((CAPTION_ROW, "left"), (CAPTION_DEPTH, "front")))
        text = rng.choice(wordings).format(row=joined([ones[i] for i in _order(facts.objects, way)]))
    sentences = [text]
    if facts.sign:
        sentences.append(rng.choice(CAPTION_SIGN).format(word=facts.sign.word))
    return " ".join(map(sentence, sentences))


def describe_facts(rng: random.Random, facts: Facts) -> str:
    """Everything that any question may ask about, in a random order and wording.

    The objects are listed along one axis, either way round; their order along the other axis is told by
    ordinal numbers of that list: "From near to far: a small red cube on the left and a large gray cone. From
    right to left: the second and the first."
    """
    if facts.bars:
        return _chart(rng, facts)
    objects = facts.objects
    if len(objects) == 1:
        sentences = [rng.choice(FACTS_ONE).format(it=_placed(objects[0]))]
    else:
        axes = [rng.choice(("left", "right")), rng.choice(("front", "behind"))]
        rng.shuffle(axes)
        listed = _order(objects, axes[0])
        row = joined([_placed(objects[i]) for i in listed])
        order = joined([f"the {ORDINALS[listed.index(i)]}" for i in _order(objects, axes[1])])
        sentences = [
            rng.choice(FACTS_LIST).format(way=WAYS[axes[0]], row=row),
            rng.choice(FACTS_ORDER).format(way=WAYS[axes[1]], row=order),
        ]
        if rng.random() < 0.5:
            sentences.insert(0, rng.choice(FACTS_COUNT).format(n=len(objects)))
    if facts.sign:
        told = rng.choice(CAPTION_SIGN).format(word=facts.sign.word)
        sentences.insert(rng.choice((0, len(sentences))), told)
    return " ".join(map(sentence, sentences))


def _chart(rng: random.Random, facts: Facts) -> str:
    row = joined([f"{bar.colour} {bar.value}" for bar in facts.bars])
    return rng.choice(CAPTION_CHART).format(n=len(facts.bars), row=row)


def _placed(thing: SceneObject) -> str:
    where = place(thing)
    text = a(full(thing).noun_phrase)
    return f"{text} {PLACE[where]}" if where else text


def _order(objects: Sequence[SceneObject], way: str) -> list[int]:
    def key(i: int) -> float:
        return objects[i].x if way in ("left", "right") else objects[i].depth

    return sorted(range(len(objects)), key=key, reverse=way in ("right", "behind"))
