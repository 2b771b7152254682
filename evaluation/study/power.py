"""What a study can see: the smallest effect that it finds four times in five, measured or planned."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .bootstrap import LEVEL, most
from .student import quantile

POWER = 0.8


@dataclass(frozen=True)
class Detectable:
    """The reach of a paired comparison.

    Attributes:
        effect: smallest true difference that is found (interval without 0) with probability ``POWER``.
        half_width: of the 95 % interval.
        standard_error, df: of the difference.
    """

    effect: float
    half_width: float
    standard_error: float
    df: float


def detectable(standard_error: float, df: float) -> Detectable:
    """From a measured standard error: ``(t_.975 + t_.8) * standard_error``."""
    wide = quantile(0.5 + LEVEL / 2, round(df, 3))
    return Detectable(
        (wide + quantile(POWER, round(df, 3))) * standard_error, wide * standard_error, standard_error, df
    )


def planned(
    seeds: int,
    pictures: int,
    *,
    seed_sd: float,
    disagreement: float | None = None,
    picture_sd: float = 0.0,
    rest_sd: float | None = None,
) -> Detectable:
    """Before a run, from assumed variances of a paired difference.

    Args:
        seeds: of both cells; with one, as in its analysis, pictures alone are taken for random.
        pictures: or pairs, or whatever is resampled.
        seed_sd: standard deviation, over seeds, of the true difference.
        disagreement: share of pictures about which cell and baseline differ (right against wrong) under one seed; the
            variance of a paired difference of such outcomes. Give it, or ``rest_sd``.
        picture_sd: standard deviation, over pictures, of what of the difference all seeds share.
        rest_sd: of what is left.

    Raises:
        ValueError: less than one seed or two pictures, or neither or both of ``disagreement`` and ``rest_sd``.
    """
    if seeds < 1 or pictures < 2 or (disagreement is None) == (rest_sd is None):
        raise ValueError("planned: 1 seed and 2 pictures or more, and one of disagreement and rest_sd")
    if rest_sd is None:
        assert disagreement is not None
        rest_sd = math.sqrt(max(0.0, disagreement - picture_sd**2))
    if seeds == 1:
        return detectable(math.sqrt((picture_sd**2 + rest_sd**2) / pictures), pictures - 1)
    # Expected mean squares of the crossed table that `bootstrap.components` estimates the variance from.
    rest = rest_sd**2
    of_seeds, of_pictures = pictures * seed_sd**2 + rest, seeds * picture_sd**2 + rest
    square = (
        of_seeds**2 / (seeds - 1) + of_pictures**2 / (pictures - 1) + rest**2 / ((seeds - 1) * (pictures - 1))
    )
    total = of_seeds + of_pictures - rest
    df = min(total**2 / square, most(seeds)) if square > 0 else most(seeds)
    return detectable(math.sqrt(total / (seeds * pictures)), df)
