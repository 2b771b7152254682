"""Forest plot: a row a cell, its difference to the baseline and to its placebos, each with its interval, about a line at 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..report.markup import Markup, breakable, join, tag
from ..report.numbers import NOTHING, plain
from . import words
from .tables import GREYED, endpoint_name

HEIGHT, MIDDLE = 20, 10
"""Pixels of a row's track, and where its line runs."""


def forest(result: Mapping[str, Any], order: Sequence[str]) -> Markup | None:
    """One endpoint; None: nothing in it has an interval.

    Args:
        result: endpoint of ``ablation.json``.
        order: of cells.
    """
    rows = [(name, result["cells"][name]) for name in order]
    rows = [
        (name, row) for name, row in rows if row["difference"] and row["difference"].get("low") is not None
    ]
    if not rows:
        return None
    shown = [row["difference"] for _, row in rows]
    shown += [
        one for _, row in rows for one in row["placebos"].values() if one and one.get("low") is not None
    ]
    edge = max([abs(one[key]) for one in shown for key in ("low", "high")] + [1e-3])
    step = _step(edge)
    edge = step * math.ceil(edge / step - 1e-9)

    def at(value: float) -> str:
        return f"{50 + 50 * value / edge:.2f}%"

    ticks = [step * i for i in range(-round(edge / step), round(edge / step) + 1)]
    places = 2 if step >= 0.01 else 3
    grid = [tag("line", x1=at(t), x2=at(t), y1=0, y2=HEIGHT, class_="grid" if t else "zero") for t in ticks]
    sides = ["start", *["middle"] * (len(ticks) - 2), "end"]
    names = [
        tag("text", plain(t, places, sign=True), x=at(t), y=14, text_anchor=side)
        for t, side in zip(ticks, sides, strict=True)
    ]
    axis = tag("svg", *names, class_="axis", width="100%", height=20, aria_hidden="true")
    better = "right" if result["better"] > 0 else "left"
    grey = result["room"]["status"] in GREYED
    return tag(
        "figure",
        tag("figcaption", tag("h3", join(breakable(result["suite"]), ": ", endpoint_name(result))),
            tag("small", f"{result['role']}; better is to the {better}{'; ' + GREYED[result['room']['status']] if grey else ''}")),
        tag("div", tag("ul", *(_row(name, row, result, grid, at) for name, row in rows), class_="plot"), axis),
        class_="grey" if grey else None,
    )  # fmt: skip


def _row(
    name: str,
    row: Mapping[str, Any],
    result: Mapping[str, Any],
    grid: Sequence[Markup],
    at: Callable[[float], str],
) -> Markup:
    parts = [*grid]
    told = []
    for other, one in row["placebos"].items():
        if one and one.get("low") is not None:
            parts.append(
                tag(
                    "line",
                    x1=at(one["low"]),
                    x2=at(one["high"]),
                    y1=MIDDLE + 5,
                    y2=MIDDLE + 5,
                    class_="blind-interval",
                )
            )
            diamond = tag("path", d="M0-4.5 4.5 0 0 4.5-4.5 0z", class_="blind")
            parts.append(tag("svg", diamond, x=at(one["value"]), y=MIDDLE + 5, overflow="visible"))
            told.append(f"against its placebo {other} {words.difference(one, result['unit'])}")
    gap = row["difference"]
    word = row["verdict"]["word"] if row["verdict"] else "none"
    parts.append(
        tag("line", x1=at(gap["low"]), x2=at(gap["high"]), y1=MIDDLE, y2=MIDDLE, class_=f"interval f-{word}")
    )
    parts.append(tag("circle", cx=at(gap["value"]), cy=MIDDLE, r=4.5, class_=f"dot f-{word}"))
    difference = words.difference(gap, result["unit"])
    return tag(
        "li",
        tag("span", breakable(name), class_="name"),
        tag("span", difference if difference != NOTHING else "", class_="value"),
        tag("span", ", ".join(["", *told, *([row["verdict"]["why"]] if row["verdict"] else [])]), class_="unseen"),
        tag("svg", *parts, width="100%", height=HEIGHT, aria_hidden="true"),
    )  # fmt: skip


def legend() -> Markup:
    """What the marks mean."""
    keys = [
        ("good", "better, with its 95 % interval"),
        ("bad", "worse"),
        ("off", "no evidence, or not judged"),
        ("blind", "difference to its placebo"),
    ]
    return tag(
        "p", *(tag("span", tag("i", class_=f"key-{key}"), told) for key, told in keys), class_="legend"
    )


def _step(edge: float) -> float:
    """Between ticks: a round number of which two or three fit."""
    size = 10.0 ** math.floor(math.log10(edge / 2.5))
    return next(size * s for s in (1, 2, 5, 10) if size * s >= edge / 3)
