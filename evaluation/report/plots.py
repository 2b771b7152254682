"""Plots: a row a kind, a dot for the score, a bar for its 95 % interval, drawn as inline SVG.

Everything is placed in percent of the width, and words are ordinary text above the tracks: both stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import numbers
from .markup import Markup, breakable, tag
from .tables import Entry, blind, primary

HEIGHT, MIDDLE = 20, 10
"""Pixels of a row's track, and where its line runs."""


@dataclass(frozen=True)
class Point:
    """One row.

    Attributes:
        name: of the kind or suite.
        score: a measure (``Measure.as_dict``) with a value.
        blind: the same measure without looking; None: not measured.
        chance: score of guessing; None: not known.
    """

    name: str
    score: Mapping[str, Any]
    blind: Mapping[str, Any] | None = None
    chance: Mapping[str, Any] | None = None

    def values(self) -> list[float]:
        """Everything that must lie within the axis."""
        found = [
            float(m["value"])
            for m in (self.score, self.blind, self.chance)
            if m is not None and numbers.known(m)
        ]
        for measure in (self.score, self.blind):
            found.extend(numbers.interval(measure) or ())
        return found


def suite_points(entry: Entry) -> list[Point]:
    """The whole suite, then its kinds, those without a value left out."""
    name, by_kind = entry.get("primary", ""), entry.get("by_kind") or {}
    unseen = (entry.get("blind") or {}).get("by_kind") or {}
    whole = Point("all", primary(entry) or {}, blind(entry), entry.get("measures", {}).get("chance"))
    kinds = [
        Point(kind, measures.get(name) or {}, (unseen.get(kind) or {}).get(name), measures.get("chance"))
        for kind, measures in by_kind.items()
    ]
    return [point for point in [whole, *kinds] if numbers.known(point.score)]


def plot(points: Sequence[Point]) -> Markup:
    """Rows of one unit: words, and below them a track of SVG that is as wide as the page lets it be."""
    low, high, ticks = _axis(points)

    def at(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    digits = 0 if high - low > 4 else 2
    grid = [tag("line", x1=at(t), x2=at(t), y1=0, y2=HEIGHT, class_="grid") for t in ticks]
    names = [
        tag("text", numbers.plain(t, digits), x=at(t), y=14, text_anchor=side)
        for t, side in zip(ticks, ["start", *["middle"] * (len(ticks) - 2), "end"], strict=True)
    ]
    axis = tag("svg", *names, class_="axis", width="100%", height=20, aria_hidden="true")
    return tag("div", tag("ul", *(_row(point, grid, at) for point in points), class_="plot"), axis)


def _row(point: Point, grid: Sequence[Markup], at: Callable[[float], str]) -> Markup:
    parts = [*grid, tag("line", x1="0%", x2="100%", y1=MIDDLE, y2=MIDDLE, class_="track")]
    told = f"95 % {numbers.interval_text(point.score)}"
    if point.chance is not None and numbers.known(point.chance):
        x = at(point.chance["value"])
        parts.append(tag("line", x1=x, x2=x, y1=1, y2=HEIGHT - 1, class_="chance"))
        told += f", chance {numbers.with_error(point.chance)}"
    if point.blind is not None and numbers.known(point.blind):
        parts += _bar(numbers.interval(point.blind), "blind-interval", at)
        diamond = tag("path", d="M0-5.5 5.5 0 0 5.5-5.5 0z", class_="blind")
        parts.append(tag("svg", diamond, x=at(point.blind["value"]), y=MIDDLE, overflow="visible"))
        told += f", blind {numbers.with_error(point.blind)}, n {numbers.count(point.blind['n'])}"
    parts += _bar(numbers.interval(point.score), "interval", at)
    parts.append(tag("circle", cx=at(point.score["value"]), cy=MIDDLE, r=4.5, class_="dot"))
    return tag(
        "li",
        tag("span", breakable(point.name), class_="name"),
        tag("span", numbers.with_error(point.score), tag("small", f" n {numbers.count(point.score['n'])}"), class_="value"),
        tag("span", told, class_="unseen"),
        tag("svg", *parts, width="100%", height=HEIGHT, aria_hidden="true"),
    )  # fmt: skip


def _bar(ends: tuple[float, float] | None, class_: str, at: Callable[[float], str]) -> list[Markup]:
    if ends is None:
        return []
    return [tag("line", x1=at(ends[0]), x2=at(ends[1]), y1=MIDDLE, y2=MIDDLE, class_=class_)]


def _axis(points: Sequence[Point]) -> tuple[float, float, list[float]]:
    """Ends and ticks: 0 .. 1 for shares, else round numbers around everything that is shown."""
    values = [value for point in points for value in point.values()]
    if (
        all(point.score.get("unit", "share") == "share" for point in points)
        and min(values) >= 0
        and max(values) <= 1
    ):
        return 0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]
    low, high = min(values), max(values)
    rough = (high - low or abs(high) or 1.0) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * s for s in (1, 2, 5, 10) if size * s >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return first * step, last * step, [n * step for n in range(first, last + 1)]


def legend(points: Sequence[Point]) -> Markup:
    """What the marks mean, of those that are there."""
    keys = [("dot", "score with 95 % interval", True)]
    keys.append(("blind", "blind: another question’s picture", any(numbers.known(p.blind) for p in points)))
    keys.append(("chance", "chance", any(numbers.known(p.chance) for p in points)))
    shown = [tag("span", tag("i", class_=f"key-{key}"), words) for key, words, there in keys if there]
    return tag("p", *shown, class_="legend")
