"""How sure a difference is: seeds and pictures resampled, and the interval that small numbers of seeds need.

**Two levels.** A study draws seeds (initial weights, data order) and pictures; every seed answers about the same pictures, so
the two are crossed. A replicate draws as many seeds and as many pictures, with repetition, and computes the measure anew
from sums over the drawn pictures: ratios stay ratios, and both sides of a difference see the same draw (Owen 2007, "The
pigeonhole bootstrap").

**Few seeds.** The spread of replicates of six seeds is that of the mean of six known seeds, not of the mean of all seeds one
might have drawn: too narrow by ``sqrt(5 / 6)``, and read with a normal quantile where 5 degrees of freedom want t's. So the
percentiles are stretched about the estimate. Components of variance (seeds, pictures, the rest) are taken from a two-way
table of leave-one-out values, ``V = s2_seed / S + s2_picture / U + s2_rest / (S U)`` with no component below 0; its
degrees of freedom follow Satterthwaite, and are at most ``CAP (S - 1)``: that few seeds seem alike is itself uncertain. The
percentiles are scaled so that a symmetric distribution of replicates gives ``estimate ± t sqrt(V)``; a skewed one is longer on
its long side, and no side is shorter than that, so that an interval without 0 and ``p < .05`` go together. BCa corrects for bias
and skew, but not for the number of seeds, and was left out for that. ``tests/evaluation/test_study_coverage.py``
simulates studies: coverage of these intervals and of plain percentiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .student import quantile, two_sided

REPLICATES = 2000
LEVEL = 0.95
CAP = 4
"""Degrees of freedom never exceed so many for each of seeds - 1."""

DRAWN = 20261127
"""Seed of the draws: numbers of a study never change from one reading to the next."""


@dataclass(frozen=True)
class Estimate:
    """A number with how sure it is.

    Attributes:
        value: over all seeds and pictures; None: not defined.
        low, high: ends of its 95 % interval; None where there can be none.
        standard_error: sqrt(V), see above.
        df: degrees of freedom of V.
        p: two-sided, of "it is 0", from ``value / standard_error`` and t.
        seeds: that it rests on.
        pictures: that it rests on (units that are resampled).
        n: what the measure counts (questions, pairs, mentions ...), for one seed.
        by_seed: its value for each seed.
        variance: components ``seed``, ``picture``, ``rest`` (standard deviations).
    """

    value: float | None
    low: float | None
    high: float | None
    standard_error: float | None
    df: float | None
    p: float | None
    seeds: tuple[int, ...]
    pictures: int
    n: int
    by_seed: tuple[float, ...]
    variance: dict[str, float]

    @property
    def clear(self) -> int:
        """1 or -1 if its interval lies wholly above or below 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


@lru_cache(8)
def picture_draws(pictures: int, replicates: int = REPLICATES) -> np.ndarray:
    """How often each picture is drawn: (replicates, pictures) float32, rows sum to ``pictures``."""
    rng = np.random.Generator(np.random.PCG64([DRAWN, 1, pictures]))
    drawn = rng.integers(0, pictures, (replicates, pictures))
    drawn += np.arange(replicates)[:, None] * pictures
    counts = np.bincount(drawn.ravel(), minlength=replicates * pictures)
    return counts.reshape(replicates, pictures).astype(np.float32)


@lru_cache(32)
def seed_draws(seeds: int, replicates: int = REPLICATES) -> np.ndarray:
    """Share of each seed: (replicates, seeds) float64, rows sum to 1."""
    rng = np.random.Generator(np.random.PCG64([DRAWN, 2, seeds]))
    drawn = rng.integers(0, seeds, (replicates, seeds)) + np.arange(replicates)[:, None] * seeds
    counts = np.bincount(drawn.ravel(), minlength=replicates * seeds)
    return counts.reshape(replicates, seeds) / seeds


def components(pseudo: np.ndarray) -> tuple[float, float, dict[str, float]]:
    """Variance of the mean of a crossed table, its degrees of freedom, and where it comes from.

    Args:
        pseudo: (S, U) value of each seed and picture; with S = 1, pictures alone are taken for random.

    Returns:
        V, degrees of freedom (infinite where V is 0), standard deviations of ``seed``, ``picture``, ``rest``.
    """
    S, U = pseudo.shape
    mean = pseudo.mean()
    by_seed, by_picture = pseudo.mean(1), pseudo.mean(0)
    if S == 1:
        spread = float(pseudo.var(ddof=1)) if U > 1 else 0.0
        return spread / U, max(U - 1, 1), {"seed": 0.0, "picture": math.sqrt(spread), "rest": 0.0}
    of_seeds = float(U * ((by_seed - mean) ** 2).sum() / (S - 1))
    if U == 1:
        return of_seeds / S, S - 1, {"seed": math.sqrt(of_seeds), "picture": 0.0, "rest": 0.0}
    of_pictures = float(S * ((by_picture - mean) ** 2).sum() / (U - 1))
    rest = pseudo - by_seed[:, None] - by_picture + mean
    of_rest = float((rest**2).sum() / ((S - 1) * (U - 1)))
    # What exceeds the rest by rounding alone must not decide the degrees of freedom.
    seed, picture = (
        (one - of_rest) / n if one > of_rest * (1 + 1e-6) else 0.0
        for one, n in ((of_seeds, U), (of_pictures, S))
    )
    total = seed / S + picture / U + of_rest / (S * U)
    parts = (
        (S - 1, (seed > 0) * of_seeds),
        (U - 1, (picture > 0) * of_pictures),
        ((S - 1) * (U - 1), of_rest * (1 - (seed > 0) - (picture > 0))),
    )
    square = sum((part / (S * U)) ** 2 / df for df, part in parts)
    df = total**2 / square if square > 0 else math.inf
    return total, df, {"seed": math.sqrt(seed), "picture": math.sqrt(picture), "rest": math.sqrt(of_rest)}


def estimate(
    by_seed: np.ndarray,
    replicates: np.ndarray,
    pseudo: np.ndarray,
    *,
    seeds: tuple[int, ...],
    n: int,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """A number over seeds, with its interval.

    Args:
        by_seed: (S,) value for each seed, over all pictures.
        replicates: (B, S) the same over drawn pictures; seeds are drawn here.
        pseudo: (S, U) leave-one-out values of each picture, see ``resampled.Resampled``.
        seeds: S of them.
        n: what the measure counts.
        limits: what the measure cannot leave.
    """
    S, U = pseudo.shape
    told = tuple(float(value) for value in by_seed)
    value = math.fsum(told) / S
    drawn = (seed_draws(S, len(replicates)) * replicates).sum(1)
    broken = ~np.isfinite(drawn)
    if not math.isfinite(value) or not np.isfinite(pseudo).all() or broken.mean() > 0.05 or S * U < 2:
        known = value if math.isfinite(value) else None
        return Estimate(known, None, None, None, None, None, seeds, U, n, told, {})
    drawn = drawn[~broken]
    variance, df, parts = components(pseudo)
    error = math.sqrt(variance)
    if error <= 1e-9 * max(1.0, abs(value)):  # rounding: nothing differs between any two pictures or seeds
        clear = abs(value) > 1e-12
        return Estimate(value, value, value, 0.0, df, 0.0 if clear else 1.0, seeds, U, n, told, parts)
    df = min(df, most(S))
    needed = quantile(0.5 + LEVEL / 2, round(df, 3)) * error
    spread = float(drawn.std())
    if spread > 1e-12:
        scale = needed / (quantile(0.5 + LEVEL / 2, math.inf) * spread)
        ends = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
        low, high = (value + scale * (end - value) for end in ends)
        low, high = min(low, value - needed), max(high, value + needed)
    else:  # too few seeds for their draws to differ
        low, high = value - needed, value + needed
    low, high = float(np.clip(low, *limits)), float(np.clip(high, *limits))
    p = two_sided(round(value / error, 6), round(df, 3))
    return Estimate(value, low, high, error, df, p, seeds, U, n, told, parts)


def most(seeds: int) -> float:
    """Most degrees of freedom that so many seeds are worth; pictures alone (one seed) are not held to it."""
    return CAP * (seeds - 1) if seeds > 1 else math.inf


def percentile(by_seed: np.ndarray, replicates: np.ndarray) -> tuple[float, float]:
    """The plain percentile interval of the two-level bootstrap, which is too narrow for few seeds: for comparison."""
    drawn = (seed_draws(len(by_seed), len(replicates)) * replicates).sum(1)
    low, high = np.quantile(drawn, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)
