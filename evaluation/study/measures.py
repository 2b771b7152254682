"""Measures as functions of sums over pictures: whatever is resampled, they stay exactly what the scorers compute.

Each question (or pair, figure, caption) adds a few columns; a measure is a function of their sums. A share is right answers
by questions, CHAIR hallucinated mentions by mentions, a balanced accuracy the mean of two shares. Resampling pictures is
then resampling rows, and no ratio is ever a mean of ratios. ``tests/evaluation/test_study_measures.py`` holds every one
against its scorer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.errors import UserError, nearest
from ..scorers import Scorer
from ..scorers.cvbench import SOURCES
from ..scorers.groups import grouped, needed, pairs
from ..scorers.letters import options_of
from ..scorers.mcq import ROLL
from ..scorers.pope import SPLITS, Pope, split_of
from ..scorers.scenes import Scenes
from ..scorers.yesno import gold_yes_no

Records = Sequence[Mapping[str, Any]]
Columns = Callable[[Records, Scorer], np.ndarray]
"""(n marked predictions, their scorer) -> (n, K) float64. What several questions share stands at one of them."""

SAME_GROUP: dict[str, tuple[str, ...]] = {"hallusion_bench": ("category", "subcategory", "set_id")}
"""Keys of ``meta`` by which a scorer's questions hang together beyond their picture: resampled together."""


@dataclass(frozen=True)
class Form:
    """How a measure comes out of sums.

    Attributes:
        columns: of each question.
        weights: the measure is the sum of ``weights[j] * sums[2 j] / sums[2 j + 1]``; None: the harmonic mean of two ratios.
        unit: see ``scorers.base.Measure``.
        better: 1 if more is better, -1 if less is, 0 if neither: then it is no endpoint.
        marked: whether the columns need ``parsed`` and ``right``.
    """

    columns: Columns
    weights: tuple[float, ...] | None = (1.0,)
    unit: str = "share"
    better: int = 1
    marked: bool = True

    def value(self, sums: np.ndarray) -> np.ndarray:
        """Sums (..., K) -> measures (...); NaN where there is nothing to measure."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = sums[..., 0::2] / sums[..., 1::2]
        if self.weights is not None:
            return ratios[..., 0] if self.weights == (1.0,) else ratios @ np.asarray(self.weights)
        known = np.where(
            sums[..., 1::2] > 0, ratios, 0.0
        )  # nothing named: a precision of nothing finds nothing
        total = known.sum(-1)
        harmonic = np.divide(2 * known.prod(-1), total, out=np.zeros_like(total), where=total > 0)
        return np.where(sums[..., 3] > 0, harmonic, np.nan)

    def count(self, sums: np.ndarray) -> int:
        """What the measure is a mean over; of a harmonic mean, what recall is."""
        return round(float(sums[..., 3] if self.weights is None else sums[..., 1::2].sum(-1)))


def form(scorer: Scorer, measure: str) -> Form:
    """The form of a scorer's measure.

    Raises:
        UserError: it has none of that name that could be resampled.
    """
    found = _forms(scorer)
    if measure in found:
        return found[measure]
    for pattern, make in _PATTERNS.items():
        match = re.fullmatch(pattern, measure)
        if match and pattern.split("/")[0] in found:
            return make(match[1])
    raise UserError(
        f"scorer {scorer.name}: no measure '{measure}' to compare cells by{nearest(measure, found)}"
    )


def _forms(scorer: Scorer) -> dict[str, Form]:
    forms = {
        "accuracy": Form(_where(lambda record: True)),
        "unparsed": Form(_where(lambda record: True, lambda record: record["parsed"] is None), better=-1),
        "nll": Form(_nll, unit="nats", better=-1, marked=False),
    }
    name = scorer.name.partition("@")[0]
    if isinstance(scorer, Scenes):
        forms |= _SCENES | {f"exists/{key}": _exists(one) for key, one in _POPE.items()}
    elif isinstance(scorer, Pope):
        forms |= _POPE
    elif name.startswith("cv_bench"):
        forms |= _CV_BENCH
    elif name == "scene_captions":
        from .caption_measures import (
            caption_forms,  # here: it needs what draws scenes, and the others need nothing
        )

        forms |= caption_forms()
        del forms["accuracy"]
    else:
        forms |= _OTHERS.get(name, {})
    return forms


def _where(
    chosen: Callable[[Mapping[str, Any]], bool],
    hit: Callable[[Mapping[str, Any]], bool] = lambda record: record["right"],
) -> Columns:
    """A share of some of the questions."""

    def columns(records: Records, scorer: Scorer) -> np.ndarray:
        inside = np.fromiter((bool(chosen(r)) for r in records), float, len(records))
        hits = np.fromiter((bool(hit(r)) for r in records), float, len(records))
        return np.stack([hits * inside, inside], 1)

    return columns


def _beside(*parts: Columns) -> Columns:
    return lambda records, scorer: np.concatenate([part(records, scorer) for part in parts], 1)


def _together(groups: Callable[[Records], list[list[Mapping[str, Any]]]]) -> Columns:
    """A share of groups, right if all of a group are; it stands at the group's first question."""

    def columns(records: Records, scorer: Scorer) -> np.ndarray:
        at = {id(record): i for i, record in enumerate(records)}
        found = np.zeros((len(records), 2))
        for group in groups(records):
            found[at[id(group[0])]] = all(record["right"] for record in group), 1
        return found

    return columns


def _nll(records: Records, scorer: Scorer) -> np.ndarray:
    """Of the right answer, nats: ``nll`` of a prediction, or out of its ranked choices. Without either, it is not counted."""
    found = np.zeros((len(records), 2))
    for i, record in enumerate(records):
        value = record.get("nll")
        if value is None:
            gold = (record.get("logprobs") or {}).get(record["gold"])
            value = None if gold is None else -gold["sum"]
        if value is not None and np.isfinite(value):
            found[i] = value, 1
    return found


def _paired(records: Records) -> Records:
    return [record for record in records if record["meta"].get("pair") is not None]


def _has_prior(record: Mapping[str, Any]) -> bool:
    return record["meta"].get("prior") is not None


def _prior(chosen_aligned: bool, hit_prior: bool = False) -> Columns:
    def columns(records: Records, scorer: Scorer) -> np.ndarray:
        assert isinstance(scorer, Scenes)

        def inside(record: Mapping[str, Any]) -> bool:
            return _has_prior(record) and scorer.is_prior(record, record["gold"]) == chosen_aligned

        if hit_prior:
            return _where(inside, lambda r: _has_prior(r) and scorer.is_prior(r, r["parsed"]))(
                records, scorer
            )
        return _where(inside)(records, scorer)

    return columns


_SCENES = {
    "pair_accuracy": Form(_together(lambda records: pairs(_paired(records))[0])),
    "aligned_accuracy": Form(_prior(True)),
    "conflict_accuracy": Form(_prior(False)),
    "balanced_accuracy": Form(_beside(_prior(True), _prior(False)), (0.5, 0.5)),
    "prior_answer_rate": Form(_prior(False, hit_prior=True), better=-1),
}


def _of_fact(fact: str) -> Form:
    return Form(
        _together(lambda rs: [p for p in pairs(_paired(rs))[0] if str(p[0]["meta"].get("fact")) == fact])
    )


def _of_split(split: str) -> Form:
    return Form(_where(lambda record: str(record["meta"].get("split")) == split))


_PATTERNS: dict[str, Callable[[str], Form]] = {"pair_accuracy/(.+)": _of_fact, "accuracy/(.+)": _of_split}


def _said_yes(what: str, split: str | None = None) -> Columns:
    """Columns of ``precision``, ``recall``, ``f1`` and ``yes_ratio`` of yes."""

    def columns(records: Records, scorer: Scorer) -> np.ndarray:
        pope = scorer.pope if isinstance(scorer, Scenes) else scorer
        assert isinstance(pope, Pope)
        inside = np.array([split is None or split_of(r) == split for r in records], float)
        said = np.array([pope.counts_as(r, r["parsed"]) == "yes" for r in records], float) * inside
        gold = np.array([gold_yes_no(r) == "yes" for r in records], float) * inside
        both = said * gold
        of = {
            "precision": (both, said), "recall": (both, gold), "f1": (2 * both, said + gold), "yes_ratio": (said, inside),
        }  # fmt: skip
        return np.stack(of[what], 1)

    return columns


_THIRDS = (1 / 3, 1 / 3, 1 / 3)
_POPE = {
    "accuracy": Form(_where(lambda record: True)),
    "precision": Form(_said_yes("precision")),
    "recall": Form(_said_yes("recall")),
    "f1": Form(_said_yes("f1")),
    "yes_ratio": Form(_said_yes("yes_ratio"), better=0),
    "mean_of_splits": Form(_beside(*(_where(lambda r, s=s: split_of(r) == s) for s in SPLITS)), _THIRDS),
    "f1_mean_of_splits": Form(_beside(*(_said_yes("f1", s) for s in SPLITS)), _THIRDS),
}


def _exists(one: Form) -> Form:
    """A measure of POPE over the questions of scenes that ask whether something exists."""

    def columns(records: Records, scorer: Scorer) -> np.ndarray:
        at = [i for i, r in enumerate(records) if str(r["meta"].get("split")).startswith("exists_")]
        part = one.columns([records[i] for i in at], scorer)
        found = np.zeros((len(records), part.shape[1] if at else 2 * len(one.weights or (1.0, 1.0))))
        found[at] = part
        return found

    return Form(columns, one.weights, one.unit, one.better)


def _of_source(source: str) -> Columns:
    return _where(lambda record: needed(record, "source") == source)


_CV_BENCH = {
    **{name: Form(_of_source(name)) for name in SOURCES},
    "2d": Form(_beside(*map(_of_source, SOURCES[:2])), (0.5, 0.5)),
    "3d": Form(_of_source(SOURCES[2])),
    "overall": Form(_beside(*map(_of_source, SOURCES)), (0.25, 0.25, 0.5)),
}


def _circular(records: Records) -> list[list[Mapping[str, Any]]]:
    copies = grouped(records, lambda record: int(needed(record, "index")) % ROLL)
    return [group for group in copies if len(group) >= options_of(group[0])[0]]


def _figures(last: str) -> Columns:
    keys = (*SAME_GROUP["hallusion_bench"], last)
    return _together(lambda records: grouped(records, lambda r: tuple(str(needed(r, key)) for key in keys)))


_OTHERS: dict[str, dict[str, Form]] = {
    "mmvp": {"pair_accuracy": Form(_together(lambda records: pairs(records)[0]))},
    "mmbench": {"circular_accuracy": Form(_together(_circular))},
    "hallusion_bench": {
        "aAcc": Form(_where(lambda record: True)),
        "fAcc": Form(_figures("figure_id")),
        "qAcc": Form(_figures("question_id")),
    },
}
