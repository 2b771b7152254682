"""Numbers as the page prints them: ``.63 ±.02``, always with what they are a mean over and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..scorers.base import Measure, mean_of

Z = 1.96
"""Standard errors of half a 95 % interval."""

BARE = ("share", "count", "difference", "number")
"""Units that are not written behind the number."""

NOTHING = "–"
"""Where there is no number."""


def known(measure: Mapping[str, Any] | None) -> bool:
    """Whether a measure (``Measure.as_dict``) has a value."""
    value = None if measure is None else measure.get("value")
    return isinstance(value, int | float) and math.isfinite(value)


def plain(value: float, digits: int = 2, sign: bool = False) -> str:
    """``.63``, ``1.00``, ``−.03``; with ``sign`` also ``+.03``."""
    written = f"{abs(value):,.{digits}f}"
    if written.startswith("0."):
        written = written[1:]
    nothing = not written.strip("0.,")
    mark = "−" if value < 0 and not nothing else "+" if sign and not nothing else ""
    return mark + written


def digits_of(value: float, error: float | None, unit: str) -> int:
    """Decimals that a value is worth: two, three where its error would read .00, none for counts."""
    if unit == "count":
        return 0
    if abs(value) >= 100:
        return 1
    return 3 if error is not None and 0 < error < 0.005 else 2


def with_error(measure: Mapping[str, Any] | None, sign: bool = False) -> str:
    """``.63 ±.02``: value and standard error; a unit other than a share is named."""
    if measure is None or not known(measure):
        return NOTHING
    unit, error = measure.get("unit", "share"), measure.get("standard_error")
    value, digits = float(measure["value"]), digits_of(measure["value"], error, unit)
    written = plain(value, digits, sign)
    if error is not None:
        written += f" ±{plain(error, digits)}"
    return written if unit in BARE else f"{written} {unit}"


def interval(measure: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """95 % interval of a measure.

    Wilson's for shares of independent questions, which has a width even where all answers are right; for other
    measures 1.96 standard errors to both sides, within 0 .. 1 for shares. None where there is no standard error.
    """
    if measure is None or not known(measure) or measure.get("standard_error") is None:
        return None
    value, error, n = float(measure["value"]), float(measure["standard_error"]), int(measure.get("n") or 0)
    if measure.get("unit", "share") != "share" or not 0 <= value <= 1:
        return value - Z * error, value + Z * error
    if n and math.isclose(error, math.sqrt(value * (1 - value) / n), abs_tol=1e-9):
        middle, spread = (
            (value + Z * Z / (2 * n)),
            Z * math.sqrt(value * (1 - value) / n + (Z / (2 * n)) ** 2),
        )
        scale = 1 + Z * Z / n
        return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
    return max(0.0, value - Z * error), min(1.0, value + Z * error)


def between(ends: tuple[float, float] | None, digits: int = 2, sign: bool = False) -> str:
    """``.59 to .67``."""
    return NOTHING if ends is None else " to ".join(plain(end, digits, sign) for end in ends)


def interval_text(measure: Mapping[str, Any] | None) -> str:
    """The 95 % interval of a measure, with as many decimals as the measure."""
    if measure is None or not known(measure):
        return NOTHING
    digits = digits_of(measure["value"], measure.get("standard_error"), measure.get("unit", "share"))
    return between(interval(measure), digits)


def difference(new: Mapping[str, Any] | None, old: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``new - old`` as a measure of unit ``difference``; its error is that of independent questions. None: not both known."""
    if new is None or old is None or not known(new) or not known(old):
        return None
    if new.get("unit", "share") != old.get("unit", "share"):
        return None
    errors = [new.get("standard_error"), old.get("standard_error")]
    error = None if None in errors else math.hypot(*(float(e or 0.0) for e in errors))
    unit = new.get("unit", "share")
    return {
        "value": new["value"] - old["value"],
        "n": min(new["n"], old["n"]),
        "standard_error": error,
        "unit": "difference" if unit == "share" else unit,
    }


def difference_interval(new: Mapping[str, Any], old: Mapping[str, Any]) -> tuple[float, float] | None:
    """95 % interval of ``new - old`` out of the two intervals (Newcombe 1998, method 10).

    It has a width where all of a few answers are right, which the standard errors have not. Independent questions.
    """
    one, other, gap = interval(new), interval(old), difference(new, old)
    if one is None or other is None or gap is None:
        return None
    below = math.hypot(new["value"] - one[0], other[1] - old["value"])
    above = math.hypot(one[1] - new["value"], old["value"] - other[0])
    return gap["value"] - below, gap["value"] + above


def relative(new: Mapping[str, Any] | None, old: Mapping[str, Any] | None) -> str:
    """``+4.8 %`` of the old value; nothing where that is not above 0, as no percentage of it can be meant."""
    if new is None or old is None or not known(new) or not known(old) or old["value"] <= 0:
        return NOTHING
    return f"{plain(100 * (new['value'] / old['value'] - 1), 1, sign=True)} %"


def mean_over(measures: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """Unweighted mean of shares, n added up; suites may share pictures, so the error is an upper bound.

    None where a measure is no share or has no value: a mean over fewer suites would be another number.
    """
    found = [m for m in measures if m is not None and known(m) and m.get("unit", "share") == "share"]
    if not found or len(found) < len(measures):
        return None
    parts = [Measure(float(m["value"]), int(m["n"]), m.get("standard_error")) for m in found]
    return mean_of(parts, related=True).as_dict()


def count(n: int) -> str:
    """``1,240``."""
    return f"{n:,}"
