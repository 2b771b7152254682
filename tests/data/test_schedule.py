"""Counts of streams under a schedule: exact, steady, and the same from wherever one asks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.data.schedule import RAMPS, Schedule


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, np.ndarray, int]:
    """A schedule, its weights in each of its phases, and where the last one starts."""
    streams, phases = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    starts = [0, *sorted(draw(st.sets(st.integers(1, 200), min_size=phases - 1, max_size=phases - 1)))]
    weight = st.sampled_from([0.0, 0.001, 0.5, 1.0, 2.0, 3.0])
    row = st.lists(weight, min_size=streams, max_size=streams).filter(any)
    weights = draw(st.lists(row, min_size=phases, max_size=phases))
    return Schedule(starts, weights, draw(st.sampled_from(RAMPS))), np.array(weights), starts[-1]


@given(schedules())
@settings(max_examples=300, deadline=None)
def test_counts_add_up_never_fall_and_follow_the_weights(made: tuple[Schedule, np.ndarray, int]) -> None:
    schedule, weights, last = made
    positions = np.arange(last + 200)
    counts = schedule.counts(positions)
    assert (counts.sum(1) == positions).all() and (counts >= 0).all()
    taken = np.diff(counts, axis=0)
    assert (taken >= 0).all()
    shares = np.stack([schedule.weights_at(p) for p in positions])
    assert np.allclose(shares.sum(1), 1) and (shares > -1e-9).all()
    # Cumulative weights, by trapezoids where they move and by steps where they jump.
    each = (shares[1:] + shares[:-1]) / 2
    jumps = np.isin(positions[1:], schedule.starts)
    each[jumps & (schedule.ramp == "step")] = shares[:-1][jumps & (schedule.ramp == "step")]
    wanted = np.concatenate([np.zeros((1, shares.shape[1])), np.cumsum(each, 0)])
    assert np.abs(counts - wanted).max() < weights.shape[1]
    # Off is off, from the very place where it is switched off.
    if schedule.ramp == "step":
        assert not (taken[shares[:-1] == 0] > 0).any()


@given(schedules(), st.lists(st.integers(0, 400), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_a_position_has_the_same_counts_whoever_asks(
    made: tuple[Schedule, np.ndarray, int], asked: list[int]
) -> None:
    schedule = made[0]
    all_ = schedule.counts(np.arange(401))
    assert (schedule.counts(np.array(asked)) == all_[asked]).all()


@pytest.mark.parametrize("batch", [1, 16, 128])
def test_constant_weights_give_their_ratio_exactly(batch: int) -> None:
    counts = Schedule([0], [[3, 1]]).counts(np.arange(1001) * batch)
    taken = np.diff(counts, axis=0)
    if batch % 4 == 0:
        assert (taken == [batch * 3 // 4, batch // 4]).all()
    assert np.abs(counts - np.outer(np.arange(1001) * batch, [0.75, 0.25])).max() <= 1
    thousandth = Schedule([0], [[1, 0.001]]).counts(np.array([0, 1001, 1001 * 10**6]))
    assert thousandth[:, 1].tolist() == [0, 1, 10**6]


def test_a_ramp_ends_where_the_next_phase_begins() -> None:
    schedule = Schedule([0, 1600], [[1, 0], [0, 1]], "linear")
    taken = np.diff(schedule.counts(np.arange(0, 1761, 16)), axis=0)
    assert taken[0].tolist() == [16, 0] and taken[50].tolist() == [8, 8]
    assert (taken[100:] == [0, 16]).all() and taken[:100, 1].sum() == 800
    assert np.abs(np.diff(taken[:, 1])).max() <= 1


def test_far_into_training_nothing_gets_worse() -> None:
    schedule = Schedule([0, 10**6], [[2, 1, 1], [1, 0, 7]])
    positions = 10**12 + np.arange(1000)
    counts = schedule.counts(positions)
    assert (counts.sum(1) == positions).all() and (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(counts[:, 2] - (250_000 + (positions - 10**6) * 7 / 8)).max() <= 2
