"""What may be said of a cell: always with an interval, and of a method only if it beats its placebo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bootstrap import Estimate
from .folder import METHOD_ROLES, Cell, Study

CEILING = 0.97
"""Of the baseline: above, there is no room in which a method could show."""

VERDICTS = {
    "helps": "helps",
    "harms": "harms",
    "better": "better",
    "none": "no evidence",
    "unjudged": "not judged",
}
"""Word of ``ablation.json`` -> word of the page. ``better``: than the baseline, where no placebo was run, or of a control."""


ROLE_WORDS = {
    "positive": "positive control",
    "control": "control",
    "placebo": "placebo",
    "baseline": "baseline",
}


@dataclass(frozen=True)
class Verdict:
    """What may be said.

    Attributes:
        word: one of ``VERDICTS``.
        why: in words, with numbers.
    """

    word: str
    why: str


def placebos_of(study: Study, cell: Cell) -> list[str]:
    """A cell's placebos; of a combination without one of its own, those of the methods in it, as far as they are held
    against the same baseline: others were trained on other data, and would tell that apart.
    """
    own = [name for name, other in study.cells.items() if other.placebo_of == cell.name]
    if own or cell.role not in METHOD_ROLES:
        return own
    parts = {
        name
        for name, other in study.cells.items()
        if len(other.methods) == 1
        and set(other.methods) < set(cell.methods)
        and other.matched_to == cell.matched_to
    }
    return [
        name
        for name, other in study.cells.items()
        if other.placebo_of in parts and other.matched_to == cell.matched_to
    ]


def floor_and_ceiling(
    baseline: Estimate | None, blind: float | None, unit: str, better: int, chance: float | None = None
) -> dict[str, Any]:
    """Whether the baseline leaves room.

    Args:
        baseline: level of the baseline, with its interval.
        blind: what the same model scores with another question's picture, mean over seeds; None: not asked.
        unit: of the measure.
        better: 1 or -1.
        chance: what guessing among the choices scores, which is the floor of what was not asked blind (a suite without pictures).

    Returns:
        ``status`` (``judged``, ``floor``, ``ceiling``, ``unknown``: the baseline has no interval), ``why``, ``blind``, ``chance``.
    """
    told: dict[str, Any] = {"status": "judged", "why": None, "blind": blind, "chance": chance}
    if baseline is None or baseline.value is None or baseline.low is None or baseline.high is None:
        return {**told, "status": "unknown", "why": "the baseline has no interval here"}
    level = baseline.value if better > 0 else 1 - baseline.value
    if unit == "share" and level >= CEILING:
        return {
            **told,
            "status": "ceiling",
            "why": f"the baseline is at {baseline.value:.3f}, where nothing is left to win",
        }
    floor, what = (blind, "what it scores with another picture") if blind is not None else (chance, "chance")
    if floor is not None and (baseline.low <= floor or better < 0) and (floor <= baseline.high or better > 0):
        return {
            **told,
            "status": "floor",
            "why": f"the baseline ({baseline.value:.3f}) is no better than {what} ({floor:.3f})",
        }
    if floor is None:
        told["why"] = "not asked blind: whether the baseline is above chance is not known"
    return told


def verdict(
    cell: Cell,
    room: Mapping[str, Any],
    difference: Estimate | None,
    placebos: Mapping[str, Estimate | None],
    better: int,
    *,
    missing: Sequence[int],
    identical_to: str | None,
    corrected: float | None = None,
) -> Verdict:
    """What may be said of a cell's difference to its baseline.

    Args:
        cell: which.
        room: see :func:`floor_and_ceiling`.
        difference: to its baseline.
        placebos: difference to each of its placebos.
        better: 1 if more of the measure is better, -1 if less.
        missing: planned seeds without a pair of runs.
        identical_to: cell that it repeats by construction.
        corrected: of a secondary endpoint, Holm's p.
    """
    if identical_to is not None:
        return Verdict("unjudged", f"identical to {identical_to} by construction")
    if difference is None or difference.low is None or difference.high is None:
        return Verdict("unjudged", "no interval: there is no pair of runs, or nothing to measure")
    if room["status"] != "judged":
        return Verdict("unjudged", f"{room['status']}: {room['why']}")
    if missing:
        seeds = ", ".join(map(str, missing))
        return Verdict(
            "unjudged",
            f"{len(missing)} of its planned seeds {'is' if len(missing) == 1 else 'are'} missing ({seeds})",
        )
    sign = difference.clear * better
    holds = corrected is None or corrected < 0.05
    if sign and not holds:
        return Verdict(
            "none", f"its interval excludes 0, but not after Holm's correction (p {corrected:.3f})"
        )
    if not sign:
        return Verdict("none", "its interval includes 0")
    if sign < 0:
        return Verdict("harms", "its interval lies wholly on the worse side of 0")
    if cell.role not in METHOD_ROLES:
        return Verdict("better", f"better than its baseline; it is a {ROLE_WORDS[cell.role]}, no method")
    if not placebos:
        return Verdict(
            "better",
            "better than its baseline; no placebo was run, so whether the method's own idea does it is open",
        )
    beaten = {name: one is not None and one.clear * better > 0 for name, one in placebos.items()}
    failing = [name for name, won in beaten.items() if not won]
    if failing:
        return Verdict("none", f"better than its baseline, but not than its placebo {', '.join(failing)}")
    return Verdict("helps", f"better than its baseline and than {', '.join(beaten)}")
