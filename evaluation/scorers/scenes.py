"""Our scenes: minimal pairs, answers that only habit gives, and objects that are not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .base import Measure, mean_of, share
from .exact import Exact, FirstWords
from .groups import all_right, pairs
from .pope import Pope

Records = Sequence[Mapping[str, Any]]


class Scenes(Exact):
    """``scenes``: exact answers, and what ``meta`` lets one tell apart (``split``, ``pair``, ``fact``, ``prior``).

    Each measure is there where its questions are:

    * ``accuracy``, and ``accuracy/SPLIT`` of each of several splits.
    * ``pair_accuracy`` of minimal pairs (both right), ``pair_accuracy/FACT`` by the fact in which they differ, and
      ``incomplete_pairs``, which are left out.
    * with ``meta.prior``, what somebody who knows the training data says blindly: ``aligned_accuracy`` where that is
      right, ``conflict_accuracy`` where it is not, ``balanced_accuracy`` their mean, and ``prior_answer_rate``, how often
      it was answered although it is wrong. The standard error of ``balanced_accuracy`` is an upper bound: scenes of
      the two splits are twins.
    * ``exists/...``: splits ``exists_random``, ``exists_popular``, ``exists_adversarial`` as ``pope`` reads and scores them.
    """

    name = "scenes"

    def __init__(self, rank: str = "sum"):
        super().__init__(rank)
        self.pope = Pope(rank)

    def parse(self, record: Mapping[str, Any]) -> str | None:
        """The answer; of the ``exists`` splits ``yes``, ``no`` or None."""
        return self.pope.parse(record) if _exists(record) else super().parse(record)

    def right(self, record: Mapping[str, Any], parsed: str | None) -> bool:
        """Whether it is gold."""
        return self.pope.right(record, parsed) if _exists(record) else super().right(record, parsed)

    def measures(self, marked: Records) -> dict[str, Measure]:
        """As the class says."""
        numbers = super().measures(marked)
        splits = sorted({str(record["meta"]["split"]) for record in marked if record["meta"].get("split")})
        for split in splits if len(splits) > 1 else ():
            chosen = [record for record in marked if record["meta"].get("split") == split]
            numbers[f"accuracy/{split}"] = share(record["right"] for record in chosen)
        numbers.update(_pairs([record for record in marked if record["meta"].get("pair") is not None]))
        numbers.update(self._priors([record for record in marked if record["meta"].get("prior") is not None]))
        exists = [record for record in marked if _exists(record)]
        if exists:
            numbers.update({f"exists/{name}": one for name, one in self.pope.measures(exists).items()})
        return numbers

    def _priors(self, marked: Records) -> dict[str, Measure]:
        if not marked:
            return {}
        aligned = [record for record in marked if self.is_prior(record, record["gold"])]
        conflict = [record for record in marked if not self.is_prior(record, record["gold"])]
        parts = [share(record["right"] for record in part) for part in (aligned, conflict)]
        return {
            "aligned_accuracy": parts[0],
            "conflict_accuracy": parts[1],
            "balanced_accuracy": mean_of(parts, related=True),
            "prior_answer_rate": share(self.is_prior(record, record["parsed"]) for record in conflict),
        }

    def is_prior(self, record: Mapping[str, Any], answer: str | None) -> bool:
        """Whether an answer is what habit says (``meta.prior``)."""
        return answer is not None and self.form(answer, record) == self.form(record["meta"]["prior"], record)


class ScenesFirstWords(Scenes, FirstWords):
    """``scenes_first_words``: the same, where an answer counts that begins with the gold one's words."""

    name = "scenes_first_words"


def _pairs(marked: Records) -> dict[str, Measure]:
    if not marked:
        return {}
    whole, incomplete = pairs(marked)
    facts = sorted({str(pair[0]["meta"]["fact"]) for pair in whole if pair[0]["meta"].get("fact")})
    by_fact = {
        f"pair_accuracy/{fact}": all_right(pair for pair in whole if pair[0]["meta"].get("fact") == fact)
        for fact in facts
    }
    return {"pair_accuracy": all_right(whole), **by_fact, "incomplete_pairs": incomplete}


def _exists(record: Mapping[str, Any]) -> bool:
    return str(record["meta"].get("split")).startswith("exists_")
