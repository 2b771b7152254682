"""What all suites do alike: turns of the user, letters of options, and the checks before the first question is asked."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from ...data.schema import IMAGE_MARK
from ...models.errors import UserError, nearest
from ..readers.pictures import Stored, check_pictures, pictures_of
from ..readers.rows import Row
from ..records import Item, Picture
from ..scorers import Exact, make
from ..suites import GROUPS, Suite

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
WORD_PROMPT = "Answer the question using a single word or phrase."
"""LLaVA-1.5's sentences behind multiple-choice and short-answer questions."""

NOTHING = ("", "nan")
"""An empty cell, and what pandas makes of one that it takes for text."""

MODES = ("generate", "rank", "follow")

_NUMBERED = re.compile(r"<image ?(\d+)>")


def make_suite(
    load: Callable[[], list[Item]],
    path: str | list[str],
    *,
    group: str,
    scorer: str,
    mode: str,
    max_new_tokens: int,
    limit: int | None,
) -> Suite:
    """A suite with checked keywords, whose items are read and checked when it is loaded.

    Args:
        load: reads all items, in an order whose beginning is a fair part of them.
        path: what the items are read from, for messages.
        group: one of ``suites.GROUPS``.
        scorer: name in ``scorers.SCORERS``, or ``name@token``.
        mode: one of ``MODES``.
        max_new_tokens: longest answer.
        limit: the first so many items; None: all.

    Raises:
        UserError: a keyword has no such value.
    """
    where = path if isinstance(path, str) else ", ".join(path)
    known("group", group, GROUPS)
    known("mode", mode, MODES)
    judge = make(scorer)
    if mode == "follow" and not isinstance(judge, Exact):
        raise UserError(
            f"mode: follow: scorer '{scorer}' reads whole sentences, and wrong answers are cut short; use generate"
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{name}: {value}: use 1 or more")

    def checked() -> list[Item]:
        items = load()
        if not items:
            raise UserError(f"{where}: no question in it")
        seen: set[str] = set()
        for item in items:
            if item.id in seen:
                raise UserError(f"{where}: question {item.id} is there twice")
            seen.add(item.id)
        items = items[:limit]
        if mode == "rank":
            for item in items:
                if len(item.choices) < 2:
                    raise UserError(f"{where}: question {item.id} has no choices to rank; use mode: generate")
        for item in items if mode == "follow" else ():
            if not item.gold.strip():
                raise UserError(
                    f"{where}: question {item.id} has no right answer to follow; use mode: generate"
                )
        check_pictures(picture for item in items for picture in item.pictures)
        return items

    return Suite(group, judge, checked, mode, max_new_tokens)


def known(keyword: str, value: str, values: Iterable[str]) -> None:
    """Refuse a value that is none of these, with the nearest one that is."""
    values = list(values)
    if value not in values:
        raise UserError(f"{keyword}: '{value}'{nearest(value, values)}")


def take_turns(items: Sequence[Item], key: Callable[[Item], Hashable]) -> list[Item]:
    """Items of each key in their order, keys taking turns in order of appearance: any beginning has as many of each."""
    parts: dict[Hashable, list[Item]] = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    longest = max(map(len, parts.values()), default=0)
    return [part[i] for i in range(longest) for part in parts.values() if i < len(part)]


def row_pictures(row: Row, columns: Sequence[str], folder: str) -> tuple[Picture, ...]:
    """The pictures of a row: of the first of some columns that has any.

    Raises:
        UserError: none of the columns is there.
    """
    row.column(*columns)
    stored: list[Stored] = next((row[column] for column in columns if row.get(column)), [])
    return pictures_of(stored, folder, row.place)


def one_picture(row: Row, columns: Sequence[str], folder: str) -> tuple[Picture, ...]:
    """The same, for a benchmark that has a picture to each question.

    Raises:
        UserError: a row has none, or several.
    """
    pictures = row_pictures(row, columns, folder)
    if len(pictures) != 1:
        raise UserError(f"{row.place}: column '{row.column(*columns)}' has {len(pictures)} pictures, not one")
    return pictures


def turn(row: Row, text: str, pictures: int, prompt: str) -> str:
    """The user's turn: a mark for each picture, the text, and the prompt on a line of its own.

    Marks that are in the text already (``<image>``, or ``<image 1>``, ``<image 2>`` ... in order) stay where they are.

    Raises:
        UserError: the text has another number of ``<image>`` marks.
    """
    numbers = [int(number) for number in _NUMBERED.findall(text)]
    if pictures and numbers == list(range(1, pictures + 1)):
        text = _NUMBERED.sub(IMAGE_MARK, text)
    marks = text.count(IMAGE_MARK)
    if marks and marks != pictures:
        raise UserError(f"{row.place}: {marks} {IMAGE_MARK} marks in the question, {pictures} pictures")
    if not marks:
        text = f"{IMAGE_MARK}\n" * pictures + text
    return f"{text}\n{prompt}" if prompt else text


def letters(count: int) -> tuple[str, ...]:
    """``A``, ``B`` ..."""
    return tuple(string.ascii_uppercase[:count])


def lettered(options: Sequence[str]) -> str:
    """Options a line each: ``A. first``."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(letters(len(options)), options, strict=True))


def letter_of(row: Row, answer: str, count: int) -> str:
    """The capital of an answer such as ``B``, ``b`` or ``(b)``.

    Raises:
        UserError: it names none of so many options.
    """
    plain = answer.strip().strip("().:").upper()
    if plain not in letters(count):
        raise UserError(f"{row.place}: answer '{answer}' is no letter of {count} options")
    return plain


def option_list(row: Row, column: str) -> tuple[str, ...]:
    """Options in one column: a list, or a text that is one (JSON's, Python's).

    Raises:
        UserError: it is none, or has fewer than 2 or more than 26.
    """
    value: Any = row[row.column(column)]
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if not isinstance(value, list | tuple) or not 2 <= len(value) <= 26:
        raise UserError(f"{row.place}: column '{column}' is no list of 2 to 26 options")
    return tuple(str(option).strip() for option in value)


def option_columns(row: Row) -> tuple[str, ...]:
    """Options in columns ``A``, ``B`` ... up to the first that is not there, empty or ``nan``.

    Raises:
        UserError: there are fewer than 2.
    """
    options: list[str] = []
    for letter in letters(26):
        text = row.optional(letter)
        if text in NOTHING:
            break
        options.append(text)
    if len(options) < 2:
        row.text("A")
        row.text("B")
    return tuple(options)
