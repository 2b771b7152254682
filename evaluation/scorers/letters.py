"""Multiple choice: which letter an answer names."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...models.errors import UserError
from .base import Measure, Scorer, share

_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_LABEL = re.compile(r"[\s(\[]*([A-Za-z])[\s)\].:]*")
_APART = (
    r"(?<![A-Za-z0-9])(?<![A-Za-z0-9]['-]){}(?![A-Za-z0-9]|['-][A-Za-z0-9])"  # no part of "it's", "T-shirt"
)
_ONE = r"[\"'(\[]*" + _APART.format("([A-Za-z])") + r"[\"')\]]*"
_ANSWER = re.compile(
    r"\banswer(?:\s+(?:is|was|would\s+be|should\s+be|must\s+be))?\s*[:=-]?\s*(?:(?:option|choice|letter)\s+)?"
    + _ONE,
    re.IGNORECASE,
)
_ALSO = re.compile(rf"\s*(?:/|&|,?\s*\b(?:or|and)\b)\s*{_ONE}|\s*,\s*{_ONE}(?=\s*(?:$|[.,;!?\n]|or\b|and\b))")
_MARK = re.compile(
    r"(?<!\w)[(\[]([A-Za-z])[)\]]"  # (b), [B]
    r"|^\s*([A-Za-z])[).:](?=\s|$)"  # "b. dog" at the beginning of a line
    r"|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter)\s+[\"']?" + _APART.format("([A-Za-z])") + "|"
    + _APART.format("([A-Z])"),  # B by itself
    re.MULTILINE,
)  # fmt: skip
_IN_SENTENCE = re.compile(
    r"\s+[\"']?(?!(?:or|and|is|isn't|was|because|since|as|not|but|would|seems|looks)\b)[A-Za-z]"
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:can)?not|n't|\bneither|\bnor|\bnever)\s+(?:be\s+)?(?:(?:option|choice|letter)\s+)?[\"'(\[]*$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[\"')\].]*\s+(?:(?:is|was|seems|looks)\s+)?(?:not|isn't|wasn't|wrong|incorrect|false)\b"
)
_LEAD_IN = re.compile(
    r"^(?:(?:so|therefore|thus)\s+)?(?:the\s+)?(?:(?:correct|final|right)\s+)?answer(?:\s+is)?\s*:?\s*"
    r"|^(?:it|this|that)(?:'s|\s+is)\s+"
)
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=[a-z])")


def read_letter(text: str, count: int, options: Sequence[str] = ()) -> str | None:
    """The capital letter that an answer names.

    Rules, in this order; the first that applies decides:

    1. Nothing but one letter, bare or decorated: ``A``, ``(b)``, ``B.``, ``**C**``, ``\\boxed{D}``.
    2. The text of exactly one option (unless that is itself a letter), but for case, a final full stop, a leading
       article and "the answer is" or "it is" before it. An answer that merely mentions an option's text is not read.
    3. A letter after "answer": ``The answer is B``, ``Answer: (b)``. Several ("A or B", "Answer: A ... answer: B") are
       no answer, and neither is one that the question does not have.
    4. The only letter that the answer names: ``(b)`` or ``option b`` anywhere, ``b.`` at the beginning of a line, a
       capital by itself ("It is a dog, so B"). "A" and "I" before a word are an article and a pronoun ("A dog"),
       unless that word goes on about a letter ("A is", "A or"). "Not A" and "A is wrong" name no answer.

    Text that several letters answer, and text without any, has no reading. Letters beyond ``count`` are text. Labels
    that are digits, and reasoning before the answer that uses other letters but never says "answer", are not covered.

    Args:
        text: what the model said.
        count: number of options, 1 .. 26.
        options: their texts, for rule 2; may be empty.

    Returns:
        ``A`` .. ``Z``, or None.
    """
    said = unicodedata.normalize("NFKC", text).replace("’", "'")
    said = re.sub(r"\\boxed\{([^{}]*)\}|\*+|`+|__+", lambda found: found[1] or "", said).strip()
    alone = _ALONE.fullmatch(said)
    if alone:
        return _letter(alone[1], count)
    named = _option(said, options)
    if named is not None:
        return chr(ord("A") + named)
    stated = [letter for found in _ANSWER.finditer(said) for letter in _stated(found, said)]
    if not stated:
        stated = _marks(said, count)
    return _letter(stated[0], count) if len(set(stated)) == 1 else None


def _letter(letter: str, count: int) -> str | None:
    upper = letter.upper()
    return upper if ord(upper) - ord("A") < count else None


def _stated(found: re.Match[str], said: str) -> list[str]:
    """Letters that follow "answer": one, or all of "A or B"."""
    if _is_word(found, 1, said) or _DENIED_AFTER.match(said, found.end()):
        return []  # "the answer is a dog"; "answer A is wrong"
    letters = [found[1].upper()]
    at = found.end()
    while also := _ALSO.match(said, at):
        group = 1 if also[1] else 2
        if _is_word(also, group, said):
            break
        letters.append(also[group].upper())
        at = also.end()
    return letters


def _is_word(found: re.Match[str], group: int, said: str) -> bool:
    """Whether the letter is the article "a" or the pronoun "I", before a word and without a bracket or quote of its own."""
    bare = found.end() == found.end(group)
    return bare and found[group].upper() in "AI" and _IN_SENTENCE.match(said, found.end()) is not None


def _marks(said: str, count: int) -> list[str]:
    letters = []
    for found in _MARK.finditer(said):
        letter = next(group for group in found.groups() if group)
        if found[4] and _is_word(found, 4, said):
            continue
        if _DENIED_BEFORE.search(said[: found.start()]) or _DENIED_AFTER.match(said, found.end()):
            continue
        if _letter(letter, count):
            letters.append(letter.upper())
    return letters


def _option(said: str, options: Sequence[str]) -> int | None:
    """The option whose text the answer is."""
    plain = _plain(said)
    bare = _ARTICLE.sub("", _LEAD_IN.sub("", plain))
    for wanted in (plain, bare):
        if not wanted or _ALONE.fullmatch(wanted):  # a letter is a label, even where an option's text is one
            continue
        same = [i for i, o in enumerate(options) if wanted in (_plain(o), _ARTICLE.sub("", _plain(o)))]
        if len(same) == 1:
            return same[0]
    return None


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("’", "'").split()).strip(" .!\"'")


def options_of(record: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Number of options of a question, and their texts where it says them.

    ``choices`` are the options' texts, or their labels in order (``A``, ``(a)`` ...); ``meta.options`` are the texts.

    Raises:
        UserError: neither is there, they differ in number, or there are more than 26.
    """
    choices = tuple(record.get("choices") or ())
    options = tuple(record["meta"].get("options") or ())
    labels = all(
        (found := _LABEL.fullmatch(choice)) and ord(found[1].upper()) - ord("A") == i
        for i, choice in enumerate(choices)
    )
    count = len(choices) or len(options)
    if not 1 <= count <= 26 or (options and len(options) != count):
        raise UserError(
            f"suite {record.get('suite')}, {record.get('id')}: needs 1 to 26 options in choices or meta.options, "
            f"got {len(choices)} and {len(options)}"
        )
    return count, options or (() if labels else choices)


class Letter(Scorer):
    """Accuracy of named letters, ``letter``: beside it ``chance`` and ``majority``, the share of the most frequent gold letter.

    ``gold`` is a letter in any decoration (``B``, ``(b)``) or an option's text; the reading is a capital.
    """

    name = "letter"

    def parse(self, record: Mapping[str, Any]) -> str | None:
        """The letter that the answer names (``read_letter``)."""
        return read_letter(record["output"], *options_of(record))

    def parse_choice(self, record: Mapping[str, Any], choice: str) -> str | None:
        """The letter of a choice, by its place: an option's text may itself be a letter."""
        choices: list[str] = list(record.get("choices") or ())
        if not choices:
            return super().parse_choice(record, choice)
        if choices.count(choice) > 1:  # two options with one text: either might be meant
            return None
        return _letter(chr(ord("A") + choices.index(choice)), options_of(record)[0])

    def right(self, record: Mapping[str, Any], parsed: str | None) -> bool:
        """Whether it is the gold letter."""
        return parsed is not None and parsed == self.gold(record)

    def gold(self, record: Mapping[str, Any]) -> str:
        """The gold answer as a capital.

        Raises:
            UserError: it names none of the options.
        """
        count, options = options_of(record)
        found = _LABEL.fullmatch(record["gold"])
        letter = _letter(found[1], count) if found else None
        if letter is None:
            named = _option(record["gold"], options)
            if named is None:
                where = f"suite {record.get('suite')}, {record.get('id')}"
                raise UserError(f"{where}: gold '{record['gold']}' is none of its {count} options")
            letter = chr(ord("A") + named)
        return letter

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """``accuracy``, ``chance`` (mean of one in so many options) and ``majority``."""
        n = len(marked)
        chance = math.fsum(1 / options_of(record)[0] for record in marked) / n if n else None
        golds = Counter(self.gold(record) for record in marked)
        return {
            "accuracy": share(record["right"] for record in marked),
            "chance": Measure(chance, n),
            "majority": Measure(max(golds.values()) / n if n else None, n),
        }
