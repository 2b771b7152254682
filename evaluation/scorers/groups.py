"""Measures that count several questions as one: right only if all of them are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from ...models.errors import UserError
from .base import Measure, counted, share

Marked = Mapping[str, Any]


def grouped(marked: Iterable[Marked], key: Callable[[Marked], Hashable]) -> list[list[Marked]]:
    """Predictions with the same key, in order of the keys and of ids: the same whatever order they come in."""
    groups: dict[Hashable, list[Marked]] = {}
    for record in marked:
        groups.setdefault(key(record), []).append(record)
    return [sorted(groups[name], key=lambda record: record["id"]) for name in sorted(groups, key=repr)]


def all_right(groups: Iterable[Sequence[Marked]]) -> Measure:
    """Share of groups in which every prediction is right."""
    return share(all(record["right"] for record in group) for group in groups)


def pairs(marked: Iterable[Marked]) -> tuple[list[list[Marked]], Measure]:
    """Predictions with the same ``meta.pair``.

    Returns:
        the complete pairs, and how many are incomplete: their other question was not asked, so they are neither right
        nor wrong.

    Raises:
        UserError: a prediction that names no pair, or more than two with the same one.
    """
    groups = grouped(marked, lambda record: needed(record, "pair"))
    for group in groups:
        if len(group) > 2:
            raise UserError(
                f"suite {group[0].get('suite')}: pair {group[0]['meta']['pair']} has {len(group)} questions, not 2"
            )
    whole = [group for group in groups if len(group) == 2]
    return whole, counted(len(groups) - len(whole), len(groups))


def needed(record: Marked, key: str) -> Any:
    """A value of ``meta`` that a measure cannot do without.

    Raises:
        UserError: it is not there.
    """
    value = record["meta"].get(key)
    if value is None:
        raise UserError(f"suite {record.get('suite')}, {record.get('id')}: meta.{key} is missing")
    return value
