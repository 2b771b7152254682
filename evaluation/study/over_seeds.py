"""Numbers of which a run has one, and nothing below it: Visual Contribution, time, memory. Their intervals are over seeds alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .bootstrap import LEVEL
from .student import quantile, two_sided


def over_seeds(values: Mapping[int, float], errors: Mapping[int, float] | None = None) -> dict[str, object]:
    """Mean of a value a seed, with t's 95 % interval over seeds.

    Args:
        values: by seed.
        errors: standard errors within a seed (over pictures). With one seed the interval is theirs; without them
            there is none.

    Returns:
        ``value``, ``spread`` (standard deviation over seeds; None with one), ``low``, ``high``, ``p`` (of "it is 0"), ``seeds``,
        ``by_seed``, and ``over``: what the interval is over, ``seeds``, ``pictures`` or ``nothing``.
    """
    known = {seed: float(v) for seed, v in sorted(values.items()) if v is not None and math.isfinite(v)}
    found: dict[str, object] = {
        "value": None, "spread": None, "low": None, "high": None, "p": None, "seeds": list(known),
        "by_seed": list(known.values()), "over": "nothing",
    }  # fmt: skip
    if not known:
        return found
    array = np.array(list(known.values()))
    value = float(array.mean())
    found["value"] = value
    if len(array) > 1:
        found["spread"] = float(array.std(ddof=1))
        error, df, found["over"] = float(array.std(ddof=1)) / math.sqrt(len(array)), len(array) - 1, "seeds"
    elif errors and errors.get(next(iter(known))) is not None:
        error, df, found["over"] = float(errors[next(iter(known))]), 1e6, "pictures"
    else:
        return found
    half = quantile(0.5 + LEVEL / 2, df) * error
    found |= {"low": value - half, "high": value + half}
    found["p"] = two_sided(round(value / error, 6), df) if error > 0 else (1.0 if abs(value) < 1e-12 else 0.0)
    return found


def paired(one: Mapping[int, float], other: Mapping[int, float], ratio: bool = False) -> dict[str, object]:
    """Difference (or ratio) by seed, with its interval over seeds."""
    seeds = sorted(one.keys() & other.keys())
    if ratio:
        return over_seeds({s: one[s] / other[s] for s in seeds if other[s]})
    return over_seeds({s: one[s] - other[s] for s in seeds})


def thinned(points: Sequence[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """A curve of at most ``most`` points, each the mean of its neighbours."""
    if len(points) <= most:
        return [(float(x), float(y)) for x, y in points]
    parts = np.array_split(np.array(points, float), most)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]
