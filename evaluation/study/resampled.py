"""All runs of one endpoint, resampled together: levels, differences, and contrasts of a factorial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .bootstrap import REPLICATES, Estimate, estimate, picture_draws
from .measures import Form

RunKey = tuple[str, int]
"""(cell, seed)."""

BLOCK = 256
"""Columns that are multiplied at once."""


@dataclass(frozen=True)
class Outcomes:
    """What runs answered, summed by picture.

    Attributes:
        form: how the measure comes out of sums.
        runs: (cell, seed) -> row.
        sums: (R, U, K) float64.
        same: (R, U) bool: whether the run was asked the same questions about the picture as the others; None: all were.
    """

    form: Form
    runs: Mapping[RunKey, int]
    sums: np.ndarray
    same: np.ndarray | None = None


class Resampled:
    """An endpoint's runs with their replicates.

    Args:
        outcomes: of the runs.
        replicates: draws of pictures.
    """

    def __init__(self, outcomes: Outcomes, replicates: int = REPLICATES):
        self.outcomes, self.replicates = outcomes, replicates
        self.limits = (0.0, 1.0) if outcomes.form.unit == "share" else (-math.inf, math.inf)

    @cached_property
    def values(self) -> np.ndarray:
        """(R,) the measure of each run."""
        return self.outcomes.form.value(self.outcomes.sums.sum(1))

    @cached_property
    def drawn(self) -> np.ndarray:
        """(B, R) the same over drawn pictures."""
        R, U, K = self.outcomes.sums.shape
        draws = picture_draws(U, self.replicates)
        # Shifted, so that single precision holds what differs between pictures; counts of ones and zeros are exact anyway.
        shift = np.where(_whole(self.outcomes.sums), 0.0, self.outcomes.sums.mean(1, keepdims=True))
        columns = (self.outcomes.sums - shift).transpose(1, 0, 2).reshape(U, R * K).astype(np.float32)
        parts = [draws @ columns[:, at : at + BLOCK] for at in range(0, R * K, BLOCK)]
        sums = np.concatenate(parts, 1).astype(np.float64).reshape(self.replicates, R, K)
        return self.outcomes.form.value(sums + U * shift[:, 0])

    @cached_property
    def pseudo(self) -> np.ndarray:
        """(R, U) leave-one-out values: the measure ``U v - (U - 1) v_without``, whose mean over pictures is (nearly) v."""
        sums = self.outcomes.sums
        U = sums.shape[1]
        without = self.outcomes.form.value(sums.sum(1, keepdims=True) - sums)
        return U * self.values[:, None] - (U - 1) * without

    def seeds_of(self, *cells: str) -> tuple[int, ...]:
        """Seeds under which all of some cells have a run."""
        having = [{seed for cell, seed in self.outcomes.runs if cell == name} for name in cells]
        return tuple(sorted(set.intersection(*having))) if having else ()

    def level(self, cell: str) -> Estimate | None:
        """The measure of a cell; None: it has no run."""
        return self.contrast({cell: 1.0}, self.limits)

    def difference(self, cell: str, baseline: str) -> Estimate | None:
        """Cell minus baseline, paired by seed and picture; None: they share no seed."""
        return self.contrast({cell: 1.0, baseline: -1.0})

    def contrast(
        self, weights: Mapping[str, float], limits: tuple[float, float] = (-math.inf, math.inf)
    ) -> Estimate | None:
        """A weighted sum of cells, by seed and picture; None: the cells share no seed.

        Pictures about which one of the runs was asked other questions than the rest are left out; ``pictures`` of the
        estimate tells.
        """
        seeds = self.seeds_of(*weights)
        if not seeds:
            return None
        rows = np.array([[self.outcomes.runs[cell, seed] for seed in seeds] for cell in weights])
        if self.outcomes.same is not None and not self.outcomes.same[rows.ravel()].all():
            return self._of_same(rows).contrast(weights, limits)
        factors = np.array(list(weights.values()))
        n = max(self.outcomes.form.count(self.outcomes.sums[row].sum(0)) for row in rows.ravel())
        with np.errstate(invalid="ignore"):
            return estimate(
                np.tensordot(factors, self.values[rows], 1),
                np.tensordot(factors, np.moveaxis(self.drawn[:, rows], 1, 0), 1),
                np.tensordot(factors, self.pseudo[rows], 1),
                seeds=seeds, n=n, limits=limits,
            )  # fmt: skip

    def _of_same(self, rows: np.ndarray) -> Resampled:
        used = sorted(set(rows.ravel().tolist()))
        assert self.outcomes.same is not None
        common = self.outcomes.same[used].all(0)
        names = {row: key for key, row in self.outcomes.runs.items()}
        runs = {names[row]: at for at, row in enumerate(used)}
        kept = Outcomes(self.outcomes.form, runs, self.outcomes.sums[used][:, common])
        return Resampled(kept, self.replicates)


def _whole(sums: np.ndarray) -> np.ndarray:
    """(R, 1, K) whether a column holds whole numbers only."""
    return (sums == np.round(sums)).all(1, keepdims=True)


def stack(
    form: Form,
    found: Sequence[tuple[RunKey, np.ndarray, np.ndarray]],
    units: int,
) -> Outcomes:
    """Columns of runs put together.

    Args:
        form: of the measure.
        found: (cell, seed), columns of its questions (n, K), number of each question's picture (n,).
        units: how many pictures there are.
    """
    K = found[0][1].shape[1]
    sums = np.zeros((len(found), units, K))
    for row, (_, columns, at) in enumerate(found):
        for k in range(K):
            sums[row, :, k] = np.bincount(at, weights=columns[:, k], minlength=units)
    return Outcomes(form, {key: row for row, (key, _, _) in enumerate(found)}, sums)
