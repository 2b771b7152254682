"""What every scorer is: a pure function of predictions, with a name and a version, without torch."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...models.errors import UserError, nearest
from .ranked import RANKS, likeliest


@dataclass(frozen=True)
class Measure:
    """One number of a table.

    Attributes:
        value: None where there is nothing to measure.
        n: what it is a mean over (questions, pairs, figures ...).
        standard_error: of ``value``; None where it has none.
        unit: ``share`` (0 .. 1), ``nats``, ``count`` (then ``n`` is what it is counted among) ...
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
    """Mean with the standard error of independent values; the same in any order."""
    found = [float(value) for value in values]
    n = len(found)
    if not n:
        return Measure(None, 0, None, unit)
    average = math.fsum(found) / n
    if n < 2:
        return Measure(average, n, None, unit)
    variance = math.fsum((value - average) ** 2 for value in found) / (n - 1)
    return Measure(average, n, math.sqrt(variance / n), unit)


def mean_of(parts: Sequence[Measure], *, related: bool = False) -> Measure:
    """Unweighted mean of measures (of sources, of categories), as CV-Bench and MMStar print it.

    Args:
        parts: without a value as soon as one of them has none: a mean over fewer parts is another number.
        related: they share questions or pictures, so that their errors need not be independent. The standard error is
            then its upper bound: the mean of theirs.
    """
    n = sum(part.n for part in parts)
    values = [part.value for part in parts if part.value is not None]
    if not parts or len(values) < len(parts):
        return Measure(None, n)
    errors = [part.standard_error for part in parts if part.standard_error is not None]
    error = None
    if len(errors) == len(parts):
        total = math.fsum(errors) if related else math.sqrt(math.fsum(e * e for e in errors))
        error = total / len(parts)
    return Measure(math.fsum(values) / len(parts), n, error)


def counted(value: int, among: int) -> Measure:
    """How many of ``among`` things."""
    return Measure(float(value), among, None, "count")


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

    A prediction that ranks its choices (``logprobs``) is read as though the model had said the likeliest one, so
    every scorer serves both modes; its ``primary`` measure and ``accuracy`` are then also given under the other
    normalisation (``accuracy_by_token``). A prediction with an ``error`` was never asked: it has no reading and is wrong.

    Class attributes:
        name: of the scorer; an instance that ranks by token is called ``name@token``.
        version: changes whenever the same predictions could score otherwise.
        primary: the measure that stands for the suite.

    Args:
        rank: how ranked choices are compared: ``sum`` of the log-likelihood (nats), or its mean a ``token``.

    Raises:
        UserError: another ``rank``.
    """

    name: str
    version: ClassVar[int] = 1
    primary: ClassVar[str] = "accuracy"

    def __init__(self, rank: str = "sum"):
        if rank not in RANKS:
            raise UserError(f"scorer {self.name}: rank '{rank}'{nearest(rank, RANKS)}")
        self.rank = rank
        if rank != "sum":
            self.name = f"{type(self).name}@{rank}"

    @abstractmethod
    def parse(self, record: Mapping[str, Any]) -> str | None:
        """The answer read from ``record["output"]``; None: it cannot be read."""

    def parse_choice(self, record: Mapping[str, Any], choice: str) -> str | None:
        """The answer that one of ``record["choices"]`` stands for."""
        return self.parse({**record, "output": choice})

    def read(self, record: Mapping[str, Any]) -> str | None:
        """The answer of a prediction, ranked or in words.

        Raises:
            UserError: its log-likelihoods are none.
        """
        if record.get("error"):
            return None
        if record.get("logprobs"):
            choice = likeliest(record, self.rank)
            return None if choice is None else self.parse_choice(record, choice)
        return self.parse(record)

    def right(self, record: Mapping[str, Any], parsed: str | None) -> bool:
        """Whether the reading is the gold answer."""
        return parsed is not None and parsed == record["gold"]

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """Numbers of some marked predictions (with ``parsed`` and ``right``); the suite's own go here."""
        return {"accuracy": share(record["right"] for record in marked)}

    def measures_of_kind(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """Numbers of the predictions of one kind: the same, unless some make sense for a whole suite only."""
        return self.measures(marked)

    def mark(self, records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The predictions with ``parsed`` and ``right``, whatever they had there before."""
        marked = []
        for record in records:
            parsed = self.read(record)
            right = not record.get("error") and self.right(record, parsed)
            marked.append({**record, "parsed": parsed, "right": right})
        return marked

    def score(self, records: Iterable[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Scores]:
        """Marked predictions and their scores; predictions in any order."""
        marked = self.mark(records)
        kinds = sorted({record["kind"] for record in marked})
        by_kind = {}
        if len(kinds) > 1:
            by_kind = {
                kind: self._numbers([r for r in marked if r["kind"] == kind], whole=False) for kind in kinds
            }
        return marked, Scores(self.name, self.version, self.primary, self._numbers(marked), by_kind)

    def _numbers(self, marked: Sequence[Mapping[str, Any]], whole: bool = True) -> dict[str, Measure]:
        numbers = self._measured(marked, whole)
        numbers["unparsed"] = share(record["parsed"] is None for record in marked)
        if any(record.get("logprobs") for record in marked):
            other = copy.copy(self)
            other.rank = next(rank for rank in RANKS if rank != self.rank)
            found = other._measured(other.mark(marked), whole)
            for name in (self.primary, "accuracy"):
                if name in found:
                    numbers[f"{name}_by_{other.rank}"] = found[name]
        return numbers

    def _measured(self, marked: Sequence[Mapping[str, Any]], whole: bool) -> dict[str, Measure]:
        return dict(self.measures(marked) if whole else self.measures_of_kind(marked))
