"""What task templates read off a row of a local file; lmms-eval calls these by the names that the YAMLs give."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def pictures(doc: Mapping[str, Any]) -> list[Any]:
    """Pictures of a row: ``images`` (a list), or ``image``; a question may have none."""
    found = doc.get("images")
    if found is None:
        found = [doc["image"]] if doc.get("image") is not None else []
    return list(found)


def question(doc: Mapping[str, Any], words: Mapping[str, Any] | None = None) -> str:
    """The question between ``pre_prompt`` and ``post_prompt`` of the task."""
    around = words or {}
    return f"{around.get('pre_prompt', '')}{doc['question']}{around.get('post_prompt', '')}"


def choices(doc: Mapping[str, Any]) -> list[str]:
    """The answers among which one is right."""
    return [str(choice) for choice in doc["choices"]]


def right_choice(doc: Mapping[str, Any]) -> int:
    """Index of the right answer, which a row gives as a number (from 0), as its text, or as a letter: ``B``, ``(b)``.

    Raises:
        ValueError: it is none of them.
    """
    answer, known = doc["answer"], choices(doc)
    if isinstance(answer, int) and 0 <= answer < len(known):
        return answer
    text = str(answer).strip()
    if text in known:
        return known.index(text)
    letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", text)
    if letter and (index := ord(letter[1].upper()) - ord("A")) < len(known):
        return index
    if text.isdecimal() and int(text) < len(known):
        return int(text)
    raise ValueError(f"answer {answer!r} is none of {known}")
