"""Small plots with two axes as inline SVG: interactions of two factors, learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..report.markup import Markup, breakable, join, tag
from ..report.numbers import plain
from . import words
from .factorial import settings_of

WIDTH, HEIGHT = 300, 170
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 24
"""Pixels of the drawing and around its axes."""


class _Axes:
    def __init__(self, xs: tuple[float, float], low: float, high: float, bottom: int = BOTTOM):
        self.xs, (self.low, self.high, self.ticks) = xs, _round(low, high)
        self.bottom = bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.xs[0]) / ((self.xs[1] - self.xs[0]) or 1)
        up = (y - self.low) / (self.high - self.low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - self.bottom - up * (
            HEIGHT - self.bottom - TOP
        )

    def line(self, xs: Sequence[float], ys: Sequence[float], class_: str) -> Markup:
        points = " ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in zip(xs, ys, strict=True))
        return tag("polyline", points=points, class_=class_)

    def band(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], class_: str) -> Markup:
        there = list(zip(xs, high, strict=True)) + list(zip(xs, low, strict=True))[::-1]
        return tag(
            "polygon",
            points=" ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in there),
            class_=class_,
        )

    def grid(self) -> list[Markup]:
        places = 0 if self.ticks[1] - self.ticks[0] >= 1 else 1 if self.ticks[1] - self.ticks[0] >= 0.1 else 2
        found = []
        for tick in self.ticks:
            _, y = self.at(self.xs[0], tick)
            found.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
            found.append(tag("text", plain(tick, places), x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
        return found

    def word(self, text: str, x: float, anchor: str = "middle") -> Markup:
        return tag("text", text, x=f"{self.at(x, self.low)[0]:.1f}", y=HEIGHT - 6, text_anchor=anchor)


def _round(low: float, high: float) -> tuple[float, float, list[float]]:
    rough = (high - low or abs(high) or 1.0) / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * s for s in (1, 2, 5, 10) if size * s >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return first * step, last * step, [n * step for n in range(first, last + 1)]


def _svg(parts: Sequence[Markup], told: str) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="lines", role="img", aria_label=told)


def interaction(result: Mapping[str, Any], found: Mapping[str, Any], a: str, b: str) -> Markup | None:
    """Does A and B together give more than A and B? Levels of four cells, all other factors off, and where their sum would lie.

    The interval is that of the interaction averaged over the settings of the other factors, as in the table. None: a cell
    has no number.
    """
    cells = settings_of(found["cells"], found["baseline"])
    names = [cells.get(frozenset(on)) for on in ((), (a,), (b,), (a, b))]
    levels = [None if n is None else result["cells"][n]["level"] for n in names]
    told = next((e["effect"] for e in result["effects"] if e["factors"] == [a, b]), None)
    if any(not words.known(one) for one in levels) or told is None:
        return None
    none, with_a, with_b, both = (one["value"] for one in levels if one is not None)
    added = with_a + with_b - none
    ends = [end for one in levels if one is not None for end in (one["low"], one["high"]) if end is not None]
    axes = _Axes(
        (-0.25, 1.25),
        min([none, with_a, with_b, both, added, *ends]),
        max([none, with_a, with_b, both, added, *ends]),
    )
    parts = axes.grid()
    parts += [
        axes.line((0, 1), (with_b, added), "sum"),
        axes.line((0, 1), (none, with_a), "off"),
        axes.line((0, 1), (with_b, both), "on"),
    ]
    for (x, nudge), one, class_ in zip(
        ((0, -0.02), (1, -0.02), (0, 0.02), (1, 0.02)), levels, ("off", "off", "on", "on"), strict=True
    ):
        assert one is not None
        place = x + nudge
        if one["low"] is not None:
            parts.append(axes.line((place, place), (one["low"], one["high"]), f"{class_} bar"))
        cx, cy = axes.at(place, one["value"])
        parts.append(tag("circle", cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=4, class_=class_))
    cx, cy = axes.at(1, added)
    parts.append(tag("circle", cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=4, class_="sum"))
    parts += [axes.word(f"without {a}", 0), axes.word(f"with {a}", 1)]
    unit = result["unit"]
    averaged = ", averaged over the other methods" if len(found["factors"]) > 2 else ""
    said = "no interval"
    if told.get("low") is not None:
        said = f"beyond the sum{averaged}: {words.difference(told, unit)}"
    label = (
        f"Neither {words.level(levels[0], unit)}, {a} {words.level(levels[1], unit)}, {b} {words.level(levels[2], unit)}, both "
        f"{words.level(levels[3], unit)}; their sum would be {plain(added)}; {said}"
    )
    legend = tag(
        "p", tag("span", tag("i", class_="key-off"), f"without {b}"), tag("span", tag("i", class_="key-on"), f"with {b}"),
        tag("span", tag("i", class_="key-sum"), "the sum of both"), class_="legend",
    )  # fmt: skip
    return tag(
        "figure", tag("figcaption", tag("h3", f"{a} × {b}"), tag("small", said)), _svg(parts, label), legend
    )


def curve(name: str, found: Mapping[str, Any]) -> Markup | None:
    """Learning curve of a cell, with its baseline's behind it; None: it has none."""
    lines = found["curves"]
    if name not in lines:
        return None
    own = lines[name]
    other = found["cells"][name]["matched_to"]
    behind = lines.get(other) if other else None
    every = [value for one in lines.values() for key in ("low", "high") for value in one[key]]
    last = max(one["steps"][-1] for one in lines.values())
    axes = _Axes((0, last), max(0.0, min(every)), max(every))
    parts = axes.grid()
    for stage, start in own["stages"].items():
        x, _ = axes.at(start, 0)
        if start:
            parts.append(
                tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=TOP, y2=HEIGHT - BOTTOM, class_="stage")
            )
        parts.append(tag("text", stage, x=f"{x + 4:.1f}", y=TOP + 9, class_="stage-name"))
    if behind:
        parts.append(axes.line(behind["steps"], behind["mean"], "off thin"))
    parts += [
        axes.band(own["steps"], own["low"], own["high"], "band"),
        axes.line(own["steps"], own["mean"], "on thin"),
    ]
    parts += [axes.word("0", 0, "start"), axes.word(f"{last:,.0f} steps", last, "end")]
    seeds = len(own["seeds"])
    ends = f"ends at {plain(own['mean'][-1])} ({plain(own['low'][-1])} to {plain(own['high'][-1])} over {seeds} seeds)"
    if seeds == 1:
        ends = f"ends at {plain(own['mean'][-1])} (1 seed)"
    against = f", {other} at {plain(behind['mean'][-1])}" if behind else ""
    return tag(
        "figure",
        tag("figcaption", tag("h3", breakable(name)), tag("small", join(ends, against))),
        _svg(parts, f"Loss of {name} by step: {ends}{against}"),
    )
