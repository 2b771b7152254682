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
        ValueError: it is none of them, or a number that is the index of one choice and the text of another.
    """
    answer, known = doc["answer"], choices(doc)
    text = str(answer).strip()
    by_text = known.index(text) if text in known else None
    by_number = int(text) if text.isdecimal() and int(text) < len(known) else None
    if isinstance(answer, int) and None not in (by_text, by_number) and by_text != by_number:
        raise ValueError(
            f"answer {answer!r} is the index of '{known[answer]}' and the text of another choice"
        )
    letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", text)
    by_letter = ord(letter[1].upper()) - ord("A") if letter else None
    for index in (by_text, by_number, by_letter):
        if index is not None and index < len(known):
            return index
    raise ValueError(f"answer {answer!r} is none of {known}")
