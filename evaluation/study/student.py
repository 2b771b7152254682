"""Student's t without SciPy: tails and quantiles for any number of degrees of freedom."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_NORMAL = 1e5
"""Degrees of freedom from which t is taken for normal: quantiles then differ by less than 1e-4."""


@lru_cache(4096)
def two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|), 0 .. 1.

    With ``t = sqrt(df) tan(a)`` the density is that of ``cos(a) ** (df - 1)``, which is integrated over the tail itself: small
    probabilities keep their digits.

    Args:
        t: any number, infinite ones included.
        df: degrees of freedom, more than 0.
    """
    t = abs(t)
    if math.isinf(t):
        return 0.0
    if df >= _NORMAL:
        return math.erfc(t / math.sqrt(2))
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(math.pi)
    start, end = math.atan(t / math.sqrt(df)), math.pi / 2
    if df > 4:  # beyond 40 standard deviations of the angle there is nothing, and nodes would be wasted on it
        end = min(end, start + 40 / math.sqrt(df))
    angles = start + (end - start) * (_NODES + 1) / 2
    with np.errstate(under="ignore"):
        density = np.exp((df - 1) * np.log(np.maximum(np.cos(angles), 1e-300)))
    return min(1.0, float(2 * scale * (end - start) / 2 * (_WEIGHTS * density).sum()))


@lru_cache(4096)
def quantile(share: float, df: float) -> float:
    """The t below which ``share`` (more than 0, less than 1) of the distribution lies."""
    if share == 0.5:
        return 0.0
    if share < 0.5:
        return -quantile(1 - share, df)
    if df >= _NORMAL:
        return NormalDist().inv_cdf(share)
    tail, low, high = 2 * (1 - share), 0.0, 1.0
    while two_sided(high, df) > tail:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, df) > tail else (low, middle)
    return (low + high) / 2
