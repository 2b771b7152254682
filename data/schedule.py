"""How many samples of each stream have been served at any point of training, when weights follow a schedule.

Weights are piecewise constant or piecewise linear in the number of samples served. The n-th sample of a stream is
*due* where its cumulative weight reaches n - 1/2; samples are served in the order of their due positions (for constant
weights this is the apportionment of Webster and Sainte-Laguë). So counts depend on the schedule and on the position
alone: nothing is added up batch by batch, an epoch at step 10**6 costs what the first one does, and whoever asks for
the same position gets the same answer. Counts stay within a few samples of the cumulative weights for ever, tiny
weights included; a stream of weight 0 gives nothing, and is owed nothing when it comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RAMPS = ("step", "linear")
"""``step``: weights change where a phase starts; ``linear``: they move towards the next phase's all the time."""

_PIECE = 1 << 15
"""Positions at a time: what belongs to them stays in the processor's cache."""


@dataclass(frozen=True)
class _Phase:
    """Weights from ``start`` on: ``weights + slopes * (position - start)``, and what was served before."""

    start: int
    weights: NDArray[np.float64]
    slopes: NDArray[np.float64]
    served: NDArray[np.int64]
    owed: NDArray[np.float64]
    """Cumulative weight so far, less ``served``."""

    def grown(self, s: int | slice, over: NDArray[np.float64]) -> NDArray[np.float64]:
        """Cumulative weight since the start."""
        return over * (self.weights[s] + self.slopes[s] * over / 2)

    def due(self, s: int, served: NDArray[np.int64]) -> NDArray[np.float64]:
        """Where, after the start, the next sample of a stream is due of which so many came since; infinite if never."""
        wanted, weight, slope = served + 0.5 - self.owed[s], self.weights[s], self.slopes[s]
        if not slope:
            return wanted / weight
        with np.errstate(invalid="ignore"):  # a ramp to 0 never gets there
            root = np.sqrt(weight * weight + 2 * slope * wanted)
            at = np.nan_to_num(2 * wanted / (weight + root), nan=np.inf)
        return np.where(wanted > 0, at, wanted)  # overdue: before all others, one after another

    def counts(self, over: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples of each stream among the first ``over`` ones (N,) since the start: (S, N)."""
        counts = np.zeros((len(self.weights), len(over)), np.int64)
        on = np.flatnonzero((self.weights > 0) | (self.slopes > 0))
        if len(on) == 1:
            counts[on[0]] = over
            return counts
        # What is certainly due; then what is due next is added until the sum is right. Rounded cumulative weights
        # add up to the position within half their number (and a little for rounding errors).
        certain = over - (len(on) / 2 + abs(self.owed[on].sum()) + 1e-3)
        due = np.full(counts.shape, np.inf)
        for s in on:
            floor = np.floor(self.grown(s, np.maximum(certain, 0.0)) + self.owed[s] + 0.5)
            counts[s] = np.where(certain > 0, np.maximum(floor, 0), 0)
            due[s] = self.due(s, counts[s])
            # The order is that of due positions and of nothing else, or rounding errors would make it two orders.
            early = (due[s] <= certain) & (certain > 0)
            if early.any():
                counts[s, early] += 1
                due[s, early] = self.due(s, counts[s, early])
            before = self.due(s, counts[s] - 1)
            late = (before > certain) & (counts[s] > 0)
            if late.any():
                counts[s, late] -= 1
                due[s, late] = before[late]
        missing = over - counts.sum(0)
        while (rows := np.flatnonzero(missing > 0)).size:
            first = due[:, rows].argmin(0)  # of equals the first stream
            for s in on:
                mine = rows[first == s]
                counts[s, mine] += 1
                due[s, mine] = self.due(s, counts[s, mine])
            missing[rows] -= 1
        return counts


class Schedule:
    """Weights of S streams over positions.

    Args:
        starts: (P,) positions at which phases start, increasing.
        weights: (P, S), none below 0 and one above it in each phase; they need not add up to 1.
        ramp: one of :data:`RAMPS`.
        served: (S,) what was served before the first start; default: nothing.
    """

    def __init__(
        self,
        starts: Sequence[int],
        weights: Sequence[Sequence[float]],
        ramp: str = "step",
        served: Sequence[int] | None = None,
    ):
        given = np.asarray(weights, np.float64)
        given = given / given.max(1, keepdims=True)  # or their sum might overflow
        given = given / given.sum(1, keepdims=True)
        streams = given.shape[1]
        counts = np.zeros(streams, np.int64) if served is None else np.asarray(served, np.int64)
        owed, flat = np.zeros(streams), np.zeros(streams)
        self.starts, self.ramp = np.asarray(starts, np.int64), ramp
        self._phases: list[_Phase] = []
        for i, start in enumerate(starts):
            if i:
                last, length = self._phases[-1], np.array([start - starts[i - 1]])
                more = last.counts(length)[:, 0]
                counts, owed = counts + more, owed + last.grown(slice(None), length[0]) - more
            slopes = flat
            if ramp == "linear" and i + 1 < len(starts):
                slopes = (given[i + 1] - given[i]) / (starts[i + 1] - start)
            on = (given[i] > 0) | (slopes > 0)
            self._phases.append(_Phase(int(start), given[i], slopes, counts, np.where(on, owed, 0.0)))
            owed = self._phases[-1].owed

    def _refuse_before(self, positions: NDArray[np.int64]) -> None:
        if positions.size and positions.min() < self.starts[0]:
            raise ValueError(f"position {positions.min()} lies before the schedule's start, {self.starts[0]}")

    def weights_at(self, position: int) -> NDArray[np.float64]:
        """Shares of the streams at a position: (S,), summing to 1.

        Raises:
            ValueError: it lies before the first phase.
        """
        self._refuse_before(np.array([position]))
        phase = self._phases[int(np.searchsorted(self.starts, position, "right")) - 1]
        return phase.weights + phase.slopes * (position - phase.start)

    def counts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many samples of each stream are among the first ``positions``.

        Args:
            positions: (N,) numbers of samples served, none before the first start.

        Returns:
            (N, S); rows add up to ``positions``, and no column falls where positions rise.

        Raises:
            ValueError: one lies before the first phase.
        """
        self._refuse_before(positions)
        counts = np.empty((len(positions), len(self._phases[0].weights)), np.int64)
        which = np.searchsorted(self.starts, positions, "right") - 1
        for i, phase in enumerate(self._phases):
            rows = np.flatnonzero(which == i)
            for first in range(0, len(rows), _PIECE):
                piece = rows[first : first + _PIECE]
                counts[piece] = phase.counts(positions[piece] - phase.start).T + phase.served
        return counts
