"""Curves with error bars, drawn by Pillow alone: what an analysis shows over the layers of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

from .scorers.base import Measure

PAPER, INK, PALE, GRID = (252, 252, 250), (40, 40, 44), (120, 120, 126), (226, 226, 222)
COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (90, 90, 90),
)
"""Told apart by colour-blind readers, too."""

Point = tuple[float, float]
Colour = tuple[int, int, int]

FINER = 3
"""Lines are drawn that many times as large, then scaled down."""
LEFT, RIGHT, TOP, BOTTOM, LINE = 52, 16, 34, 44, 18
"""Pixels around a panel's axes, and of a line of the legend."""


@dataclass(frozen=True)
class Series:
    """One curve: a name for the legend (empty: not there), and a value for each place on the axis (without a value: a gap).

    Attributes:
        dashed: a mark to be beaten rather than a result; without error bars, and in the colour of the curve before it.
    """

    name: str
    values: Sequence[Measure]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        across: name of the horizontal axis; ``places``: its entries.
        series: curves.
        low, high: ends of the vertical axis; None: as the values are.
        mark: a dotted line at this height (chance).
    """

    title: str
    across: str
    places: Sequence[str]
    series: Sequence[Series]
    low: float | None = None
    high: float | None = None
    mark: float | None = None


def line_plot(
    panels: Sequence[Panel], *, width: int = 480, height: int = 260, columns: int = 2
) -> Image.Image:
    """Panels side by side, each with its legend below."""
    columns = min(columns, len(panels))
    legend = max(_legend_lines(panel, width) for panel in panels) * LINE
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + legend)), PAPER)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        drawn = _panel(panel, width, height + legend, legend)
        sheet.paste(drawn, (column * width, row * (height + legend)))
    return sheet


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, on paper."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, at most ``most`` of them."""
    raw = (high - low) / max(1, most - 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * k for k in (1, 2, 2.5, 5, 10) if base * k >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _ends(panel: Panel) -> tuple[float, float]:
    seen = [] if panel.mark is None else [panel.mark]
    for series in panel.series:
        for m in series.values:
            if m.value is not None:
                error = 0.0 if series.dashed else m.standard_error or 0.0
                seen += [m.value - error, m.value + error]
    low = min(seen, default=0.0) if panel.low is None else panel.low
    high = max(seen, default=1.0) if panel.high is None else panel.high
    room = 0.05 * (high - low) or 0.5
    return (low - room if panel.low is None else low), (
        high + room if panel.high is None else max(high, low + 1e-6)
    )


def _colours(panel: Panel) -> list[Colour]:
    chosen, number = [], -1
    for series in panel.series:
        number += 0 if series.dashed and number >= 0 else 1
        chosen.append(COLOURS[number % len(COLOURS)])
    return chosen


def _legend_places(panel: Panel, width: int) -> list[tuple[float, int]]:
    """(left, line) of each entry."""
    font = ImageFont.load_default(11)
    places, left, line = [], float(LEFT), 0
    for series in panel.series:
        room = font.getlength(series.name) + 38 if series.name else 0
        if left + room > width - 4 and left > LEFT:
            left, line = float(LEFT), line + 1
        places.append((left, line))
        left += room
    return places


def _legend_lines(panel: Panel, width: int) -> int:
    return 1 + max((line for _, line in _legend_places(panel, width)), default=0)


@dataclass(frozen=True)
class _Axes:
    """Where values lie on a panel of ``width`` pixels whose lower axis is ``foot`` pixels from the top."""

    low: float
    high: float
    places: int
    width: int
    foot: int

    @property
    def right(self) -> int:
        return self.width - RIGHT

    def x(self, i: int) -> float:
        return LEFT + (i + 0.5) / self.places * (self.right - LEFT)

    def y(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.foot - (inside - self.low) / (self.high - self.low) * (self.foot - TOP)


class _Pen:
    """Draws lines on a sheet that is ``FINER`` times as large."""

    def __init__(self, width: int, height: int):
        self.sheet = Image.new("RGB", (width * FINER, height * FINER), PAPER)
        self.draw = ImageDraw.Draw(self.sheet)

    def line(self, start: Point, end: Point, colour: Colour, thick: float = 1.0) -> None:
        ends = [(a * FINER, b * FINER) for a, b in (start, end)]
        self.draw.line(ends, fill=colour, width=round(thick * FINER))

    def broken(self, start: Point, end: Point, colour: Colour, dash: float) -> None:
        pieces = max(1, round(math.dist(start, end) / (2 * dash)))
        (x0, y0), (x1, y1) = start, end
        for p in range(pieces):
            a, b = ((x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (p / pieces, (p + 0.5) / pieces))
            self.line(a, b, colour, 1.3)

    def point(self, at: Point, colour: Colour, error: tuple[float, float] | None) -> None:
        (x, y), r = at, 2.6
        if error:
            self.line((x, error[0]), (x, error[1]), colour, 1.2)
            for end in error:
                self.line((x - 3, end), (x + 3, end), colour, 1.2)
        self.draw.ellipse([side * FINER for side in (x - r, y - r, x + r, y + r)], fill=colour)


def _panel(panel: Panel, width: int, height: int, legend: int) -> Image.Image:
    axes = _Axes(*_ends(panel), len(panel.places), width, height - BOTTOM - legend)
    pen, colours = _Pen(width, height), _colours(panel)
    for value in ticks(axes.low, axes.high):
        pen.line((LEFT, axes.y(value)), (axes.right, axes.y(value)), GRID)
    pen.line((LEFT, TOP), (LEFT, axes.foot), PALE)
    pen.line((LEFT, axes.foot), (axes.right, axes.foot), PALE)
    if panel.mark is not None:
        pen.broken((LEFT, axes.y(panel.mark)), (axes.right, axes.y(panel.mark)), INK, 2)
    for series, colour in zip(panel.series, colours, strict=True):
        _curve(pen, axes, series, colour)
    for series, colour, (left, row) in zip(panel.series, colours, _legend_places(panel, width), strict=True):
        middle = height - legend + row * LINE + LINE / 2 - 4
        if not series.name:
            continue
        if series.dashed:
            pen.broken((left, middle), (left + 18, middle), colour, 3)
        else:
            pen.line((left, middle), (left + 18, middle), colour, 1.8)
    sheet = pen.sheet.resize((width, height), Image.Resampling.LANCZOS)
    _words(sheet, panel, axes, legend)
    return sheet


def _curve(pen: _Pen, axes: _Axes, series: Series, colour: Colour) -> None:
    points = [
        (axes.x(i), axes.y(m.value), m) if m.value is not None else None for i, m in enumerate(series.values)
    ]
    for one, other in pairwise(points):
        if one is not None and other is not None:
            if series.dashed:
                pen.broken(one[:2], other[:2], colour, 4)
            else:
                pen.line(one[:2], other[:2], colour, 1.8)
    for x, y, m in [] if series.dashed else [p for p in points if p is not None]:
        value, error = m.value or 0.0, m.standard_error
        pen.point((x, y), colour, (axes.y(value + error), axes.y(value - error)) if error else None)


def _words(sheet: Image.Image, panel: Panel, axes: _Axes, legend: int) -> None:
    """Text is drawn at its own size: it would blur when scaled."""
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    pen.text((LEFT, 10), panel.title, fill=INK, font=ImageFont.load_default(13))
    marks = ticks(axes.low, axes.high)
    step = marks[1] - marks[0] if len(marks) > 1 else 0.01
    digits = next((d for d in range(6) if abs(round(step, d) - step) < 1e-9), 6)
    for value in marks:
        pen.text((LEFT - 6, axes.y(value)), f"{value:.{digits}f}", fill=PALE, font=small, anchor="rm")
    widest = max(small.getlength(place) for place in panel.places) + 6
    every = max(1, math.ceil(widest * axes.places / (axes.right - LEFT)))
    for i, place in enumerate(panel.places):
        if i % every == 0:
            pen.text((axes.x(i), axes.foot + 5), place, fill=PALE, font=small, anchor="mt")
    pen.text(((LEFT + axes.right) / 2, axes.foot + 22), panel.across, fill=PALE, font=small, anchor="mt")
    for series, (left, row) in zip(panel.series, _legend_places(panel, sheet.width), strict=True):
        middle = sheet.height - legend + row * LINE + LINE / 2 - 4
        pen.text((left + 23, middle), series.name, fill=INK, font=small, anchor="lm")
