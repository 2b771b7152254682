"""What runs answered, summed by picture."""

from __future__ import annotations

import numpy as np

from .folder import Endpoint
from .measures import Form, form
from .reading import Read
from .resampled import Outcomes, stack


def outcomes_of(read: Read, endpoint: Endpoint) -> tuple[Outcomes, list[str]] | None:
    """All runs of an endpoint summed by picture, and what is wrong with some; None: no run was asked its suite.

    Runs are ordered by cell and seed, pictures by name: the order of files and lines changes nothing.
    """
    units, suite = read.units.get(endpoint.suite), endpoint.suite
    if units is None:
        return None
    shape: Form = form(read.scorers[suite], endpoint.measure)
    keys = sorted(key for key, files in read.runs.items() if suite in files.suites)
    problems = [
        f"{cell}, seed {seed}: was not asked {suite}"
        for cell, seed in sorted(read.runs)
        if suite not in read.runs[cell, seed].suites
    ]
    found, places = [], {}
    signatures = np.zeros((len(keys), len(units)), np.uint64)
    for row, key in enumerate(keys):
        one = read.runs[key].suites[suite]
        mark = (len(one.ids), hash(tuple(one.ids)))
        if mark not in places:
            places[mark] = np.array([units.of(name) for name in one.ids])
        at = places[mark]
        asked = np.array(one.asked, np.uint64)
        order = np.argsort(at, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(at[order]) > 0])
        signatures[row, at[order][starts]] = np.add.reduceat(asked[order], starts)
        found.append((key, one.columns[endpoint], at))
    outcomes = stack(shape, found, len(units))
    usual = _most_common(signatures)
    same = signatures == usual
    if same.all():
        return outcomes, problems
    for row, key in enumerate(keys):
        others = int((~same[row]).sum())
        if others:
            problems.append(
                f"{key[0]}, seed {key[1]}: {suite}: other questions than the other runs about {others} of {len(units)} "
                f"pictures, which its comparisons leave out"
            )
    return Outcomes(shape, outcomes.runs, outcomes.sums, same), problems


def _most_common(signatures: np.ndarray) -> np.ndarray:
    """What most runs were asked about each picture."""
    if (signatures == signatures[0]).all():
        return signatures[0]
    found = np.empty(signatures.shape[1], signatures.dtype)
    for u in range(signatures.shape[1]):
        values, counts = np.unique(signatures[:, u], return_counts=True)
        found[u] = values[counts.argmax()]
    return found
