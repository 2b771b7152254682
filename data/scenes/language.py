"""Every sentence and word of the scenes: question wordings, phrases, prompts, and the closed vocabulary they
span.

Templates are ``str.format`` strings; what fills their slots is listed beside them, so the vocabulary is known
without generating anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ..sentences import sentence_key, split_sentences
from .config import COLOURS, SHAPES, SIZES, SceneConfig

WORDS = (
    "cat",
    "dog",
    "sun",
    "map",
    "key",
    "box",
    "tea",
    "fish",
    "book",
    "star",
    "milk",
    "open",
    "stop",
    "exit",
)
"""What a sign can say."""

CAPTION_PROMPTS = (
    "Describe the picture.",
    "What is in the picture?",
    "Write a short caption.",
    "Tell me what you see.",
)
"""Instructions that fit ``SceneConfig.caption_prompts``."""

TEXT_CAPTION_PROMPT = "Describe a picture."
"""The human turn of the ``text_caption`` stream."""

ATTRIBUTE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "colour": ("What colour is {it}?", "Which colour does {it} have?"),
    "shape": ("What shape is {it}?", "Which shape does {it} have?"),
    "size": ("What size is {it}?", "Is {it} small or large?"),
}
COUNT_ALL = ("How many {things} are there?", "How many {things} do you see?")
COUNT_SIDE = ("How many {things} are {where}?",)
COUNT_NOT = ("How many {things} are not {what}?",)
EXISTS = ("Is there {one}?", "Do you see {one}?")
COMPARE_X = ("Is {a} to the left or to the right of {b}?",)
COMPARE_DEPTH = ("Is {a} nearer or farther than {b}?",)
SIGN = ("What does the sign say?", "Which word is on the sign?")
SIGN_BEHIND = ("What does the sign behind {it} say?", "Which word is on the sign behind {it}?")
CHART_OUTERMOST = ("What colour is the {which} bar?",)
CHART_VALUE = ("What is the value of the {colour} bar?", "How much is the {colour} bar?")
CHART_BESIDE = ("What is the value of the bar to the {side} of the {colour} bar?",)
CHART_COLOUR = ("What colour is the bar to the {side} of the {colour} bar?",)
CHART_COUNT = ("How many bars are there?",)
CHART_COMPARE = ("Is the {a} bar taller or shorter than the {b} bar?",)

CAPTION_ONE = ("There is {it}.", "A picture of {it}.")
CAPTION_ROW = ("From left to right: {row}.", "From left to right there are {row}.")
CAPTION_DEPTH = ("From near to far: {row}.", "From near to far there are {row}.")
CAPTION_PAIR = ("There is {a} {where} {b}.",)
CAPTION_SIGN = ("The sign says {word}.", "The word on the sign is {word}.")
CAPTION_CHART = ("A bar chart: {row}.", "A chart with {n} bars: {row}.")

FACTS_COUNT = ("There are {n} objects.", "The picture shows {n} objects.")
FACTS_ONE = ("There is 1 object: {it}.", "The picture shows 1 object: {it}.")
FACTS_LIST = ("{way}: {row}.", "{way} there are {row}.")
FACTS_ORDER = ("{way}: {row}.", "{way} they are {row}.")
WAYS = {
    "left": "From left to right",
    "right": "From right to left",
    "front": "From near to far",
    "behind": "From far to near",
}
"""The first object of such a list stands to the key's side of all others."""

RELATION = {
    "left": "to the left of",
    "right": "to the right of",
    "front": "in front of",
    "behind": "behind",
}
PLACE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
SUPERLATIVE = {"left": "leftmost", "right": "rightmost", "front": "nearest", "behind": "farthest"}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
NOUN = "object"

_TEMPLATES: tuple[Sequence[str], ...] = (
    *ATTRIBUTE_QUESTIONS.values(),
    COUNT_ALL,
    COUNT_SIDE,
    COUNT_NOT,
    EXISTS,
    COMPARE_X,
    COMPARE_DEPTH,
    SIGN,
    SIGN_BEHIND,
    CHART_OUTERMOST,
    CHART_VALUE,
    CHART_BESIDE,
    CHART_COLOUR,
    CHART_COUNT,
    CHART_COMPARE,
    CAPTION_ONE,
    CAPTION_ROW,
    CAPTION_DEPTH,
    CAPTION_PAIR,
    CAPTION_SIGN,
    CAPTION_CHART,
    FACTS_COUNT,
    FACTS_ONE,
    FACTS_LIST,
    FACTS_ORDER,
    CAPTION_PROMPTS,
    (TEXT_CAPTION_PROMPT,),
)
_FILLERS = (
    *COLOURS,
    *SHAPES,
    *(f"{s}s" for s in SHAPES),
    *SIZES,
    *WORDS,
    *RELATION.values(),
    *PLACE.values(),
    *SUPERLATIVE.values(),
    *WAYS.values(),
    *ORDINALS,
    *map(str, range(10)),
    f"{NOUN} {NOUN}s the a an and , yes no left right nearer farther taller shorter tallest shortest",
)
_TOKEN = re.compile(r"\w+|[^\w\s]")
_SLOT = re.compile(r"\{\w+\}")


def tokens(text: str) -> list[str]:
    """Words and punctuation marks of a text, case kept: the units of :func:`vocabulary`."""
    return _TOKEN.findall(text)


def vocabulary(config: SceneConfig) -> list[str]:
    """Every word and punctuation mark that can occur in a record's text, sorted; the image mark is not one.

    About 140 entries: what a word-level tokenizer for a model made from nothing needs.
    """
    texts = [_SLOT.sub(" ", t) for group in _TEMPLATES for t in group]
    texts += [*_FILLERS, *config.caption_prompts, *([config.format_prompt] if config.format_prompt else [])]
    return sorted({token for text in texts for token in tokens(text)})


def template_sentences(config: SceneConfig) -> tuple[str, ...]:
    """Sentence keys that the generator uses as prompts and that say nothing about any picture, sorted."""
    prompts = [*CAPTION_PROMPTS, *config.caption_prompts, TEXT_CAPTION_PROMPT]
    if config.format_prompt:
        prompts.append(config.format_prompt)
    keys = {s.key for p in prompts for s in split_sentences(p)} | {sentence_key(p) for p in prompts}
    return tuple(sorted(keys - {""}))


def a(phrase: str) -> str:
    """``phrase`` with its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def joined(phrases: Sequence[str]) -> str:
    """``x``, ``x and y`` or ``x, y and z``."""
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def things(words: Iterable[str]) -> str:
    """Plural of a noun phrase whose last word is the noun."""
    return " ".join(words) + "s"


def sentence(text: str) -> str:
    """``text`` with a capital first letter."""
    return text[0].upper() + text[1:]
