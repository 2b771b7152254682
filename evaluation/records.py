"""What is asked, and what was answered: the two records that every suite, scorer, analysis and report share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.schema import IMAGE_MARK, pack_images
from ..models.errors import UserError

Picture = Callable[[], bytes]
"""Reads one encoded picture (JPEG, PNG ...) when it is needed: a benchmark's pictures need not fit into memory."""

NEEDED = ("suite", "id", "kind", "gold", "output")
"""Keys without which a prediction cannot be scored again."""

PER_EXCHANGE = ("asked", "prior")
"""Keys of ``meta`` that a stored sample has once an exchange, and an item once."""


@dataclass(frozen=True)
class Item:
    """One question of a suite.

    Attributes:
        id: unique within the suite, the same for every model and every run.
        question: the user's turn, with one ``<image>`` mark a picture and the suite's prompt suffix.
        pictures: read in the order of the marks.
        gold: the right answer, in the suite's own form (``yes``, ``(a)``, ``B``, a caption ...).
        kind: category that tables have a row for.
        choices: answers that may be ranked by log-likelihood, in the form in which the model would say them; may be empty.
        meta: JSON values that the scorer groups by (pair, source, figure ...), and facts that analyses look up.
        system: system prompt of this question; None: the model's own.
    """

    id: str
    question: str
    pictures: tuple[Picture, ...]
    gold: str
    kind: str = "all"
    choices: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None

    def stored(self) -> dict[str, Any]:
        """The item in the form of ``data.schema.COLUMNS``, as encoders and the adapter take it.

        Raises:
            UserError: marks and pictures do not match, or a picture cannot be read.
        """
        marks = self.question.count(IMAGE_MARK)
        if marks != len(self.pictures):
            raise UserError(f"item {self.id}: {marks} {IMAGE_MARK} marks, {len(self.pictures)} pictures")
        turns = [{"from": "human", "value": self.question}, {"from": "gpt", "value": self.gold or " "}]
        if self.system is not None:
            turns.insert(0, {"from": "system", "value": self.system})
        return {
            "id": self.id,
            "conversations": turns,
            "images": pack_images([read() for read in self.pictures]),
            "meta": {
                **{key: [value] if key in PER_EXCHANGE else value for key, value in self.meta.items()},
                "turns": "independent",
                "kinds": [self.kind],
            },
        }


def prediction(suite: str, item: Item, output: str, **extra: Any) -> dict[str, Any]:
    """One line of ``predictions.jsonl``.

    Args:
        suite: name of the suite in the configuration.
        item: what was asked.
        output: the model's raw answer.
        extra: further JSON values (``logprobs``: for each of ``choices`` ``sum`` (nats) and ``tokens``).
    """
    return {
        "suite": suite,
        "id": item.id,
        "kind": item.kind,
        "question": item.question,
        "gold": item.gold,
        "choices": list(item.choices),
        "output": output,
        "meta": dict(item.meta),
        **extra,
    }


def prompt_hash(questions: Iterable[str]) -> str:
    """SHA-256 over the sorted questions of a suite (16 hex digits): two scores of unlike prompts are told apart."""
    digest = hashlib.sha256()
    for question in sorted(questions):
        digest.update(question.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def write_predictions(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write ``predictions.jsonl`` whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read ``predictions.jsonl``, ours or one written by hand.

    Raises:
        UserError: no such file, a line that is no prediction, or an id that occurs twice in a suite.
    """
    records: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for number, record in _lines(path):
        missing = [key for key in NEEDED if not isinstance(record.get(key), str)]
        if missing:
            raise UserError(f"{path}:{number}: no prediction: {', '.join(missing)} missing or no text")
        for name, kind, what in (
            ("meta", dict, "object"),
            ("logprobs", dict, "object"),
            ("choices", list, "list"),
        ):
            if not isinstance(record.get(name, kind()), kind):
                raise UserError(f"{path}:{number}: {name} is no {what} but {json.dumps(record[name])[:40]}")
        if not all(isinstance(choice, str) for choice in record.get("choices", ())):
            raise UserError(f"{path}:{number}: choices are not all text")
        key = (record["suite"], record["id"])
        if key in seen:
            raise UserError(f"{path}:{number}: suite {key[0]} has {key[1]} twice")
        seen.add(key)
        records.append({"choices": [], "meta": {}, "question": "", **record})
    if not records:
        raise UserError(f"{path}: no predictions in it")
    return records


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: no JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: no prediction, but a {type(record).__name__}")
        yield number, record
