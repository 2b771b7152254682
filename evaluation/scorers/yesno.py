"""Yes or no, read from a sentence: LLaVA's rule for POPE, word for word, and a reading that may also find neither."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from ...models.errors import UserError

_YES = "yes|yeah|yep|yup|sure|certainly|definitely|absolutely|indeed|correct|true|right|of course"
_NO = "no|nope|nah|not|never|none|neither|false|incorrect|wrong"
_UNSURE = re.compile(
    r"(?:\bnot|n't) (?:\w+ )?(?:sure|certain|clear|know|tell|say|determine|possible to)\b"
    r"|\bcannot (?:\w+ )?(?:tell|say|determine)\b|\b(?:unsure|uncertain|unclear|unknown|maybe|perhaps)\b"
    r"|\b(?:impossible|hard|difficult) to (?:tell|say|determine)\b|\byes(?: and | or | ?/ ?)no\b|\bno (?:and|or) yes\b"
)
_STATED = re.compile(r"\banswer(?: is| would be)? ?[:=]? ?[\"'(\[]?(yes|no)\b")
_LEAD = re.compile(rf"\W*(?:(?P<yes>{_YES})|(?P<no>{_NO}))\b(?!')")
_NEGATED = re.compile(r"\b(?:no|not|never|none|nothing|nobody|neither|without|cannot)\b|n't\b")
_AFFIRMED = re.compile(
    r"\W*(?:there(?:'s| is| are| was| were| appears?| seems?)|i (?:can )?see"
    r"|(?:it|he|she|they|i|this|that|these|those) (?:is|are|was|were|do|does|did|has|have|can)"
    r"|(?:it|he|she|that)'s|they're)\b"
)


def llava_pope_rule(text: str) -> str:
    """``yes`` or ``no`` as LLaVA's ``eval_pope.py`` has it: anything that does not deny is a yes.

    Of the text before the first full stop, without commas and split at spaces: ``no`` if one word is ``No``, ``not`` or
    ``no``, else ``yes``. So "Nope", "NO" and gibberish are yes. Outer white space is dropped first, as LLaVA does when
    it decodes.
    """
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_yes_no(text: str) -> str | None:
    """``yes`` or ``no``; None where the text says neither, both, or that it cannot tell.

    In this order: words of doubt anywhere are no answer; "the answer is yes"; a first word that affirms or denies
    ("Sure", "Nope", "Certainly not"); the first sentence with one of "yes" and "no", or with a negation ("There isn't one"), or
    beginning as an affirmation does ("There is", "It does", "I can see"); exactly one of "yes" and "no" further on. That
    "There is a cat" says nothing about a dog is beyond a rule.
    """
    said = unicodedata.normalize("NFKC", text).replace("’", "'").lower()
    said = " ".join(re.sub(r"[*_`#]+", " ", said).split())
    if _UNSURE.search(said):
        return None
    stated = set(_STATED.findall(said))
    if stated:
        return stated.pop() if len(stated) == 1 else None
    lead = _LEAD.match(said)
    if lead:
        denied = re.match(r"\W*not\b", said[lead.end() :])  # "Absolutely not"
        return "yes" if lead["yes"] and not denied else "no"
    first = re.split(r"[.!?]", said, maxsplit=1)[0]
    found = _named(first)
    if len(found) == 2:
        return None
    if "yes" in found:
        return "yes"
    if _NEGATED.search(first):
        return "no"
    if _AFFIRMED.match(first):
        return "yes"
    found = _named(said)
    return found.pop() if len(found) == 1 else None


def _named(text: str) -> set[str]:
    return {"yes", "no"} & set(re.findall(r"\w+", text))


def gold_yes_no(record: Mapping[str, Any]) -> str:
    """``yes`` or ``no`` of ``gold``: ``yes``, ``no``, ``1`` or ``0`` in the files.

    Raises:
        UserError: it is something else.
    """
    gold = record["gold"].strip().rstrip(".").lower()
    found = {"yes": "yes", "no": "no", "1": "yes", "0": "no"}.get(gold)
    if found is None:
        raise UserError(
            f"suite {record.get('suite')}, {record.get('id')}: gold should be yes or no, got '{record['gold']}'"
        )
    return found
