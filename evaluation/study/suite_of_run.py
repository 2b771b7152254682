"""A run's answers to one suite: judged, and as the columns that its measures are sums of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.errors import UserError
from ..scorers import Scorer
from .folder import Endpoint
from .measures import form

Judged = dict[tuple[str, ...], dict[str, Any]]
"""(id, question, gold, output ...) -> what the scorer made of it: runs give few different answers."""


@dataclass
class SuiteOfRun:
    """Answers of a run to one suite.

    Attributes:
        ids: of its questions.
        asked: hash of each question, its gold answer and its id.
        columns: endpoint -> (n, K).
        right: share right of each question (NaN: not judged), for the wall.
        chance: share right of who guesses among each question's choices; None: some have no choices.
    """

    ids: list[str]
    asked: list[int]
    columns: dict[Endpoint, np.ndarray]
    right: np.ndarray
    chance: float | None = None


def suite_of_run(
    scorer: Scorer, records: list[dict[str, Any]], wanted: Sequence[Endpoint], judged: Judged
) -> SuiteOfRun:
    """Columns of a suite's endpoints out of a run's predictions.

    Args:
        scorer: of the suite.
        records: predictions; marked here.
        wanted: endpoints of the suite.
        judged: what other runs' answers were, added to.

    Raises:
        UserError: an endpoint's kind has no question, or the scorer cannot read a prediction.
    """
    forms = {one: form(scorer, one.measure) for one in wanted}
    captions = scorer.name.startswith("scene_captions")
    _judge(scorer, records, captions, judged)
    columns: dict[Endpoint, np.ndarray] = {}
    for one, shape in forms.items():
        if one.kind is None:
            columns[one] = shape.columns(records, scorer)
            continue
        at = [i for i, record in enumerate(records) if record["kind"] == one.kind]
        if not at:
            raise UserError(f"{one.key}: no question of kind '{one.kind}'")
        part = shape.columns([records[i] for i in at], scorer)
        columns[one] = np.zeros((len(records), part.shape[1]))
        columns[one][at] = part
    right = np.array([np.nan if r["right"] is None else float(r["right"]) for r in records])
    asked = [_digest(f"{r['id']}\0{r['question']}\0{r['gold']}") for r in records]
    choices = [len(r.get("choices") or ()) for r in records]
    chance = float(np.mean([1 / n for n in choices])) if choices and min(choices) > 1 else None
    return SuiteOfRun([r["id"] for r in records], asked, columns, right, chance)


def _judge(
    scorer: Scorer,
    records: list[dict[str, Any]],
    captions: bool,
    judged: Judged,
) -> None:
    """Mark predictions, each answer to a question once; of captions, hold them against their scenes (``compared``)."""
    keys: list[tuple[str, ...]] = [
        (r["id"], r["question"], r["gold"], r["output"], str(r.get("error"))) for r in records
    ]
    ranked = [i for i, record in enumerate(records) if record.get("logprobs")]
    for i in ranked:
        keys[i] = (*keys[i], json.dumps(records[i]["logprobs"], sort_keys=True))
    new = {key: record for key, record in zip(keys, records, strict=True) if key not in judged}
    if captions:
        from ..scorers.captions import compared

        for key, record in new.items():  # none is judged as a whole: hardly one says all
            judged[key] = {"compared": compared(record), "parsed": scorer.read(record), "right": None}
    else:
        marked = scorer.mark(list(new.values()))
        for key, record in zip(new, marked, strict=True):
            judged[key] = {"parsed": record["parsed"], "right": record["right"]}
    for key, record in zip(keys, records, strict=True):
        record.update(judged[key])


def _digest(words: str) -> int:
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")
