"""What every scorer is: a pure function of predictions, with a name and a version, without torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Measure:
    """One number of a table.

    Attributes:
        value: None where there is nothing to measure.
        n: what it is a mean over (questions, pairs, figures ...).
        standard_error: of ``value``; None where it has none.
        unit: ``share`` (0 .. 1), ``nats``, ``count`` ...
    """

    value: float | None
    n: int
    standard_error: float | None = None
    unit: str = "share"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"value": self.value, "n": self.n, "standard_error": self.standard_error, "unit": self.unit}


def share(flags: Iterable[bool]) -> Measure:
    """Share of true flags, with the binomial standard error."""
    values = [bool(flag) for flag in flags]
    n = len(values)
    if not n:
        return Measure(None, 0)
    p = sum(values) / n
    return Measure(p, n, math.sqrt(p * (1 - p) / n))


def mean(values: Iterable[float], unit: str = "share") -> Measure:
    """Mean with the standard error of independent values."""
    found = [float(value) for value in values]
    n = len(found)
    if not n:
        return Measure(None, 0, None, unit)
    average = sum(found) / n
    if n < 2:
        return Measure(average, n, None, unit)
    variance = sum((value - average) ** 2 for value in found) / (n - 1)
    return Measure(average, n, math.sqrt(variance / n), unit)


def mean_of(parts: Sequence[Measure]) -> Measure:
    """Unweighted mean of independent measures (of sources, of categories), as CV-Bench and MMStar print it."""
    known = [part for part in parts if part.value is not None]
    if not known or len(known) < len(parts):
        return Measure(None, sum(part.n for part in parts))
    value = sum(part.value or 0.0 for part in known) / len(known)
    errors = [part.standard_error for part in known]
    error = None
    if all(e is not None for e in errors):
        error = math.sqrt(sum((e or 0.0) ** 2 for e in errors)) / len(known)
    return Measure(value, sum(part.n for part in known), error)


@dataclass(frozen=True)
class Scores:
    """What a scorer says of one suite.

    Attributes:
        scorer: its name.
        version: changes whenever the same predictions could score otherwise.
        primary: name of the measure that stands for the suite in tables.
        measures: name -> number. Always ``unparsed``: the share of answers without a reading.
        by_kind: kind -> name -> number.
    """

    scorer: str
    version: int
    primary: str
    measures: dict[str, Measure]
    by_kind: dict[str, dict[str, Measure]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "scorer": f"{self.scorer}/{self.version}",
            "primary": self.primary,
            "measures": {name: measure.as_dict() for name, measure in self.measures.items()},
            "by_kind": {
                kind: {name: measure.as_dict() for name, measure in row.items()}
                for kind, row in self.by_kind.items()
            },
        }


class Scorer(ABC):
    """Reads answers and adds them up.

    Class attributes:
        name: of the scorer.
        version: changes whenever the same predictions could score otherwise.
        primary: the measure that stands for the suite.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    primary: ClassVar[str] = "accuracy"

    @abstractmethod
    def parse(self, record: Mapping[str, Any]) -> str | None:
        """The answer read from ``record["output"]``; None: it cannot be read."""

    def right(self, record: Mapping[str, Any], parsed: str | None) -> bool:
        """Whether the reading is the gold answer."""
        return parsed is not None and parsed == record["gold"]

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """Numbers of some marked predictions (with ``parsed`` and ``right``); the suite's own go here."""
        return {"accuracy": share(record["right"] for record in marked)}

    def mark(self, records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The predictions with ``parsed`` and ``right``, whatever they had there before."""
        marked = []
        for record in records:
            parsed = self.parse(record)
            marked.append({**record, "parsed": parsed, "right": self.right(record, parsed)})
        return marked

    def score(self, records: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Scores]:
        """Marked predictions and their scores; predictions in any order."""
        marked = self.mark(records)
        kinds = sorted({record["kind"] for record in marked})
        by_kind = {}
        if len(kinds) > 1:
            by_kind = {
                kind: self._numbers([record for record in marked if record["kind"] == kind]) for kind in kinds
            }
        return marked, Scores(self.name, self.version, self.primary, self._numbers(marked), by_kind)

    def _numbers(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        return {**self.measures(marked), "unparsed": share(record["parsed"] is None for record in marked)}
