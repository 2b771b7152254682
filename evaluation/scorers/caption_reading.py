"""What a caption of a scene says: things with their attributes, where they stand, how many there are, what a sign says.

The language is that of ``data.scenes.language`` (noun phrases of size, colour and shape, relations, places, rows from one
side to the other, counts, signs, bars of charts) with a few everyday synonyms. What is said in other words is not read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ...data.scenes.config import COLOURS, SHAPES, SIZES
from ...data.scenes.language import NOUN, PLACE, WAYS, tokens

BAR = "bar"
"""Shape of a chart's bars."""

SYNONYMS = {
    "grey": "gray",
    "ball": "sphere",
    "balls": "spheres",
    "big": "large",
    "little": "small",
    "tiny": "small",
}
NUMBERS = {word: n for n, word in enumerate(("zero", "one", "two", "three", "four", "five", "six"))}

_NOUNS = {**{s: s for s in SHAPES}, NOUN: None, BAR: BAR}
_NOUNS |= {f"{word}s": shape for word, shape in _NOUNS.items()}
_ARTICLES = ("a", "an", "the", "no")
_SIGN = re.compile(r"\b(?:word on the sign is|sign (?:says|reads))(?: [^\w\s])* (\w+)")
_ENDS = re.compile(r"[.!?;\n]+")
_VERB = r"(?: is| are| stands| stand)?"
_PAIR = re.compile(rf"<(\d+)>{_VERB} (?:(?:(?:to|on) the )?(left|right) of|(in front of)|(behind)) <(\d+)>")
_PLACES = {phrase: where for where, phrase in PLACE.items()}
_PLACE = re.compile(rf"<(\d+)>{_VERB} ({'|'.join(_PLACES)})\b(?! of)")
_ROWS = {way.lower(): side for side, way in WAYS.items()}
_MENTION = re.compile(r"<(\d+)>")


@dataclass(frozen=True)
class Thing:
    """An object or a bar, mentioned or there; None where nothing is said."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    value: int | None = None

    @property
    def whole(self) -> bool:
        """Whether all is said that there is to it."""
        last = self.value if self.shape == BAR else self.size
        return None not in (self.shape, self.colour, last)

    def agrees(self, other: Thing) -> bool:
        """Whether nothing that is said of this one is otherwise for ``other``."""
        mine = (self.shape, self.colour, self.size, self.value)
        theirs = (other.shape, other.colour, other.size, other.value)
        return all(a is None or a == b for a, b in zip(mine, theirs, strict=True))

    def __str__(self) -> str:
        return " ".join(
            str(w) for w in (self.size, self.colour, self.shape or NOUN, self.value) if w is not None
        )


@dataclass
class Said:
    """What a caption says.

    Attributes:
        things: mentioned, in order.
        relations: (thing, key of ``language.RELATION``, thing); the first stands to that side of the second.
        places: (thing, key of ``language.PLACE``).
        counts: (number, whether of bars) where things are counted as such ("3 objects").
        signs: words.
    """

    things: list[Thing] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    places: list[tuple[int, str]] = field(default_factory=list)
    counts: list[tuple[int, bool]] = field(default_factory=list)
    signs: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.things or self.counts or self.signs)

    def __str__(self) -> str:
        """The reading in one line, for tables: ``small red cube; large blue cone; 1 left 2; sign cat``."""
        parts = [str(thing) for thing in self.things]
        parts += [f"{a + 1} {relation} {b + 1}" for a, relation, b in self.relations]
        parts += [f"{thing + 1} {where}" for thing, where in self.places]
        parts += [f"{n} {BAR if bars else NOUN}s" for n, bars in self.counts]
        return "; ".join([*parts, *(f"sign {word}" for word in self.signs)])


def read_caption(text: str) -> Said:
    """What ``text`` says; everything else in it is passed over."""
    said = Said()
    for sentence in _ENDS.split(text.lower()):
        words = " ".join(tokens(sentence))
        said.signs += _SIGN.findall(words)
        words = [SYNONYMS.get(word, word) for word in _SIGN.sub("", words).split()]
        _sentence(" ".join(_with_mentions(words, said)), said)
    return said


def _sentence(skeleton: str, said: Said) -> None:
    """Relations and places of a sentence whose mentions are numbers in angle brackets."""
    for one, side, front, behind, other in _PAIR.findall(skeleton):
        relation = side or (front and "front") or (behind and "behind")
        said.relations.append((int(one), relation, int(other)))
    said.places += [(int(one), _PLACES[phrase]) for one, phrase in _PLACE.findall(skeleton)]
    side = next((side for way, side in _ROWS.items() if skeleton.startswith(way)), None)
    if side is not None:
        row = [int(one) for one in _MENTION.findall(skeleton)]
        said.relations += [(a, side, b) for a, b in pairwise(row) if a != b]


def _with_mentions(words: Sequence[str], said: Said) -> list[str]:
    """The words with every noun phrase replaced by the number of its thing; things and counts are noted."""
    out, at = [], 0
    while at < len(words):
        end = _bar(words, at, said) or _noun_phrase(words, at, said)
        if end is None:
            out.append(words[at])
            at += 1
            continue
        if end[1] is not None:
            out.append(f"<{end[1]}>")
        at = end[0]
    return out


def _number(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() and len(word) < 3 else NUMBERS.get(word)


def _bar(words: Sequence[str], at: int, said: Said) -> tuple[int, int | None] | None:
    """``red 3``: a bar and its value. Returns where it ends and the number of its thing."""
    if words[at] not in COLOURS:
        return None
    end = at + (2 if words[at + 1 : at + 2] == [":"] else 1)
    value = _number(words[end]) if end < len(words) else None
    if value is None:
        return None
    said.things.append(Thing(BAR, words[at], None, value))
    return end + 1, len(said.things) - 1


def _noun_phrase(words: Sequence[str], start: int, said: Said) -> tuple[int, int | None] | None:
    """``the 2 small red cubes``: where it ends, and the number of its (first) thing, None for a count alone."""
    at, article, number = start, None, None
    if words[at] in _ARTICLES:
        article, at = words[at], at + 1
    if at < len(words) and (number := _number(words[at])) is not None:
        at += 1
    size = colour = None
    while at < len(words) and (words[at] in SIZES or words[at] in COLOURS):
        size, colour = (words[at], colour) if words[at] in SIZES else (size, words[at])
        at += (
            2
            if words[at + 1 : at + 2] == [","] and words[at + 2 : at + 3] != [] and _adjective(words[at + 2])
            else 1
        )
    if at == len(words) or words[at] not in _NOUNS or words[at : at + 2] == [BAR, "chart"]:
        return None
    shape, end = _NOUNS[words[at]], at + 1
    if article == "no":
        return end, None
    if size is None and colour is None and shape in (None, BAR):
        if number is not None:
            said.counts.append((number, shape == BAR))
        return end, None
    thing = Thing(shape, colour, size)
    if article == "the":  # what was mentioned before is not mentioned anew
        for i, before in enumerate(said.things):
            if thing.agrees(before):
                return end, i
    first = len(said.things)
    said.things += [thing] * (1 if number is None else number)
    return end, first if len(said.things) > first else None


def _adjective(word: str) -> bool:
    return word in SIZES or word in COLOURS
