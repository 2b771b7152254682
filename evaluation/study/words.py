"""Numbers and verdicts of a study in words: never a difference without its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report.markup import Markup, breakable, join, tag
from ..report.numbers import BARE, NOTHING, between, count, digits_of, plain
from .verdicts import VERDICTS

Told = Mapping[str, Any]
"""An estimate in ``ablation.json``."""

SIGNS = {"helps": "▲", "better": "△", "harms": "▼", "none": "○", "unjudged": "–"}
"""Of verdicts, so that colour alone never tells one."""


def known(one: Told | None) -> bool:
    """Whether there is a number."""
    return one is not None and one.get("value") is not None


def digits(one: Told, unit: str) -> int:
    """Decimals that an estimate is worth; more where an end of its interval would read 0 and is not."""
    error = one.get("standard_error")
    if error is None and one.get("high") is not None:
        error = (one["high"] - one["low"]) / 4
    places = digits_of(one["value"], error, unit)
    ends = [end for end in (one.get("low"), one.get("high")) if end]
    while places < 4 and any(round(end, places) == 0 for end in ends):
        places += 1
    return places


def level(one: Told | None, unit: str) -> Markup:
    """``.63 ±.02``: mean and spread over seeds (one seed: the mean alone), its unit where that is no share."""
    if one is None or not known(one):
        return Markup(NOTHING)
    places = digits(one, unit)
    written = plain(one["value"], places)
    if one.get("spread") is not None:
        written += f" ±{plain(one['spread'], places)}"
    return join(written if unit in BARE else f"{written} {unit}")


def difference(one: Told | None, unit: str) -> str:
    """``+.05 (+.02 to +.08)``; without an interval no number is printed."""
    if one is None or not known(one) or one.get("low") is None:
        return NOTHING
    places = digits(one, unit)
    return f"{plain(one['value'], places, sign=True)} ({ends(one, unit)})"


def ends(one: Told, unit: str, sign: bool = True) -> str:
    """``+.02 to +.08``."""
    if one.get("low") is None:
        return NOTHING
    return between((one["low"], one["high"]), digits(one, unit), sign=sign)


def rests_on(one: Told) -> str:
    """``n 1,200, 600 pictures, 6 seeds``; with one seed it says what the interval leaves out."""
    seeds = len(one["seeds"])
    told = f"n {count(one['n'])}, {count(one['pictures'])} pictures, "
    return told + ("1 seed: interval over pictures only" if seeds == 1 else f"{seeds} seeds")


def mark(verdict: Mapping[str, str] | None) -> Markup | None:
    """A verdict's sign and word."""
    if verdict is None:
        return None
    word = verdict["word"]
    return tag(
        "span", tag("b", SIGNS[word], aria_hidden="true"), VERDICTS[word], class_=f"verdict v-{word}", title=verdict["why"]
    )  # fmt: skip


def sentence(name: str, row: Mapping[str, Any], result: Mapping[str, Any]) -> Markup:
    """What is said of a cell by one endpoint, with its numbers."""
    verdict, gap, unit = row["verdict"], row["difference"], result["unit"]
    told: list[object] = [tag("strong", breakable(name)), " ", mark(verdict), ": "]
    if not known(gap) or gap.get("low") is None:
        return join(*told, f"{verdict['why']}.")
    told.append(f"{difference(gap, unit)} against {row['against']}, {rests_on(gap)}")
    for other, one in row["placebos"].items() if verdict["word"] != "unjudged" else ():
        said = difference(one, unit)
        told.append(
            f"; against its placebo {other} {said}"
            if said != NOTHING
            else f"; no pair of runs with its placebo {other}"
        )
    if row.get("holm_p") is not None:
        told.append(f"; p {probability(row['holm_p'])} (Holm, of {row['holm_of']})")
    if verdict["word"] in ("none", "better", "unjudged"):
        told.append(f" ({verdict['why']})")
    return join(*told, ".")


def probability(p: float) -> str:
    """``.031``, or ``< .001``."""
    return "< .001" if p < 0.001 else plain(p, 3)
