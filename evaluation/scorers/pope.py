"""POPE (arXiv 2305.10355): is there such an object? Beside accuracy, what a model that always says yes gives away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Measure, Scorer, mean_of, share
from .yesno import gold_yes_no, llava_pope_rule, read_yes_no

SPLITS = ("random", "popular", "adversarial")
"""What is asked for in vain: any object, a frequent one, one that goes along with what is there."""


class Pope(Scorer):
    """POPE as LLaVA's ``eval_pope.py`` scores it, ``pope``.

    What counts is LLaVA's rule (``yesno.llava_pope_rule``): an answer that does not deny is a yes, gibberish too. Such
    an answer stays visible: it has no reading and is in ``unparsed``, whatever it counts as. Only what affirms
    (``yesno.read_yes_no``) is read as a yes. A question that was never asked (``error``), and one whose ranked choices are
    equally likely, count as neither and are wrong.

    Measures: ``accuracy``, ``precision``, ``recall``, ``f1`` of "yes", ``yes_ratio`` of what was counted (of the gold
    answers: ``gold_yes_ratio``); with several splits as kinds or ``meta.split`` also ``mean_of_splits`` and
    ``f1_mean_of_splits``, which are None unless all three were asked. Undefined ones are None: a precision
    without any yes. Standard errors take questions as independent, and the splits' mean has an upper bound, as the
    splits share their pictures and all questions whose answer is yes.
    """

    name = "pope"
    default: str | None = "yes"
    """What an answer without a reading counts as."""

    def parse(self, record: Mapping[str, Any]) -> str | None:
        """``yes``, ``no``, or None: LLaVA's rule would call it a yes, but it does not affirm."""
        if llava_pope_rule(record["output"]) == "no":
            return "no"
        return "yes" if read_yes_no(record["output"]) == "yes" else None

    def right(self, record: Mapping[str, Any], parsed: str | None) -> bool:
        """Whether what the answer counts as is gold."""
        return self.counts_as(record, parsed) == gold_yes_no(record)

    def counts_as(self, record: Mapping[str, Any], parsed: str | None) -> str | None:
        """``yes`` or ``no``; None: neither."""
        said = not record.get("error") and not record.get("logprobs")
        return parsed or (self.default if said else None)

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """As the class says."""
        numbers = self._of_one_split(marked)
        splits = {split_of(record) for record in marked} & set(SPLITS)
        if len(splits) > 1:
            by_split = [self._of_one_split([r for r in marked if split_of(r) == split]) for split in SPLITS]
            numbers["mean_of_splits"] = mean_of([one["accuracy"] for one in by_split], related=True)
            numbers["f1_mean_of_splits"] = mean_of([one["f1"] for one in by_split], related=True)
        return numbers

    def _of_one_split(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        said = [self.counts_as(record, record["parsed"]) == "yes" for record in marked]
        gold = [gold_yes_no(record) == "yes" for record in marked]
        return {
            "accuracy": share(record["right"] for record in marked),
            "precision": share(g for s, g in zip(said, gold, strict=True) if s),
            "recall": share(s for s, g in zip(said, gold, strict=True) if g),
            "f1": f1(said, gold),
            "yes_ratio": share(said),
            "gold_yes_ratio": Measure(share(gold).value, len(gold)),
        }


class PopeRead(Pope):
    """POPE without the benefit of the doubt, ``pope_read``: ``yesno.read_yes_no``; an answer without a reading is wrong.

    It counts as neither yes nor no, but stays in every denominator.
    """

    name = "pope_read"
    default = None

    def parse(self, record: Mapping[str, Any]) -> str | None:
        """``yes``, ``no`` or None."""
        return read_yes_no(record["output"])


def split_of(record: Mapping[str, Any]) -> str:
    """One of ``SPLITS`` where ``meta.split`` or ``kind`` names one, scenes' ``exists_random`` ... included."""
    names = [str(name).removeprefix("exists_") for name in (record["meta"].get("split"), record["kind"])]
    return next((name for name in names if name in SPLITS), names[-1])


def f1(said: Sequence[bool], gold: Sequence[bool]) -> Measure:
    """F1 of "yes", ``2 TP / (said yes + gold yes)``; its standard error by linearising that ratio of means.

    None where nobody says yes.
    """
    n = len(said)
    hits = [2.0 * (s and g) for s, g in zip(said, gold, strict=True)]
    asked = [float(s) + float(g) for s, g in zip(said, gold, strict=True)]
    total = math.fsum(asked)
    if not total:
        return Measure(None, n)
    value = math.fsum(hits) / total
    if n < 2:
        return Measure(value, n)
    spread = math.fsum((hit - value * one) ** 2 for hit, one in zip(hits, asked, strict=True)) / (n - 1)
    return Measure(value, n, math.sqrt(spread / n) / (total / n))
