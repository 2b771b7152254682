"""Predictions scored again, by the same or other scorers: no model is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..models.errors import UserError, nearest
from .scorers import Scores, make

Records = Sequence[Mapping[str, Any]]


def rescore(
    predictions: Records, scorers: Mapping[str, str]
) -> tuple[list[dict[str, Any]], dict[str, Scores]]:
    """Mark and score predictions of one or several suites.

    Args:
        predictions: as ``records.read_predictions`` gives them; what they were marked with before is not looked at.
        scorers: name of a suite -> name of its scorer (``scorers.make``).

    Returns:
        marked predictions in the given order, each with ``scorer``; and the scores of each suite, in order of appearance.

    Raises:
        UserError: a suite without a scorer, a suite that nothing was predicted for, or an unknown scorer.
    """
    suites = list(dict.fromkeys(record["suite"] for record in predictions))
    for name in suites:
        if name not in scorers:
            raise UserError(f"suite {name}: no scorer is named for it")
    for name in scorers:
        if name not in suites:
            raise UserError(f"suite {name}: no predictions of it{nearest(name, suites)}")
    marked: list[dict[str, Any]] = [{} for _ in predictions]
    found = {}
    for name in suites:
        scorer = make(scorers[name])
        at = [i for i, record in enumerate(predictions) if record["suite"] == name]
        lines, found[name] = scorer.score([predictions[i] for i in at])
        for i, line in zip(at, lines, strict=True):
            marked[i] = {**line, "scorer": scorer.name}
    return marked, found


def compare(one: Records, other: Records) -> list[dict[str, Any]]:
    """Where two scorings of the same predictions differ.

    Args:
        one: marked predictions.
        other: the same ones marked otherwise, in any order.

    Returns:
        a row a prediction whose ``parsed`` or ``right`` differ, in order of ``one``: ``suite``, ``id``, ``gold``, ``output``,
        and ``one`` and ``other`` with ``scorer`` (None: not named), ``parsed``, ``right``.

    Raises:
        UserError: they are not the same predictions.
    """
    first, second = _by_id(one), _by_id(other)
    apart = sorted(first.keys() ^ second.keys())
    if apart:
        raise UserError(f"suite {apart[0][0]}, {apart[0][1]}: only one of the two scorings has it")
    rows = []
    for key, a in first.items():
        b = second[key]
        if a["output"] != b["output"]:
            raise UserError(f"suite {key[0]}, {key[1]}: the two scorings are of other outputs")
        if (a["parsed"], a["right"]) != (b["parsed"], b["right"]):
            rows.append(
                {
                    **{name: a[name] for name in ("suite", "id", "gold", "output")},
                    "one": _reading(a),
                    "other": _reading(b),
                }
            )
    return rows


def _by_id(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(record["suite"], record["id"]): record for record in records}


def _reading(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"scorer": record.get("scorer"), "parsed": record["parsed"], "right": record["right"]}
