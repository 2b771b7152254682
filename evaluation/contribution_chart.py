"""Chart of visual contributions: a row a kind of question, accuracy beside nats, points with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from .line_plot import COLOURS, GRID, INK, PALE, PAPER, ticks
from .scorers.base import Measure

NAMES = {
    "image": "its own picture",
    "other": "another picture",
    "grey": "grey picture",
    "removed": "picture removed",
}
"""Conditions as the legend calls them."""
LABELS, PANEL, GAP, ROW, TOP, FOOT, RIGHT = 150, 330, 46, 66, 72, 40, 24
"""Pixels: names of kinds, a panel, the space between both, a row, what stands above and below, the right margin."""
FINER = 3


def contribution_chart(rows: Mapping[str, Mapping[str, Measure]], conditions: Sequence[str]) -> Image.Image:
    """Draw measures as ``VisualContribution.measures`` names them.

    Args:
        rows: kind -> measures.
        conditions: the first is the own picture, the others are controls.
    """
    width, height = LABELS + 2 * PANEL + GAP + RIGHT, TOP + ROW * len(rows) + FOOT
    sheet = Image.new("RGB", (width * FINER, height * FINER), PAPER)
    colours = dict(zip(conditions, (COLOURS[0], COLOURS[1], COLOURS[6], COLOURS[2]), strict=True))
    panels = (
        ("accuracy", [f"accuracy/{c}" for c in conditions], LABELS, (0.0, 1.0)),
        ("visual contribution: own picture minus control, nats", [f"vc/{c}" for c in conditions[1:]],
         LABELS + PANEL + GAP, _range(rows, [f"vc/{c}" for c in conditions[1:]])),
    )  # fmt: skip
    words: list[tuple[float, float, str, tuple[int, int, int], str, int]] = []
    draw = ImageDraw.Draw(sheet)
    for title, names, left, (low, high) in panels:
        words.append((left, 40, title, INK, "lm", 12))
        for value in ticks(low, high):
            x = left + (value - low) / (high - low) * PANEL
            foot = height - FOOT
            heavy = value == 0
            draw.line(_scaled(x, TOP - 8, x, foot), fill=PALE if heavy else GRID, width=FINER)
            words.append((x, foot + 12, f"{value:g}", PALE, "mm", 11))
        for r, measures in enumerate(rows.values()):
            for n, name in enumerate(names):
                y = TOP + ROW * (r + (n + 1) / (len(names) + 1)) - 4
                _point(draw, measures[name], y, left, low, high, colours[name.partition("/")[2]])
    for r, (kind, measures) in enumerate(rows.items()):
        y = TOP + ROW * (r + 0.5) - 4
        words += [
            (LABELS - 14, y - 8, kind[:20], INK, "rm", 13),
            (LABELS - 14, y + 8, f"n {measures['accuracy/' + conditions[0]].n}", PALE, "rm", 11),
        ]
        if r:
            draw.line(_scaled(12, y - ROW / 2, width - RIGHT, y - ROW / 2), fill=GRID, width=FINER)
    left = float(LABELS)
    for condition in conditions:
        x, y = left * FINER, 18 * FINER
        draw.ellipse([x, y - 4 * FINER, x + 8 * FINER, y + 4 * FINER], fill=colours[condition])
        words.append((left + 14, 18, NAMES.get(condition, condition), INK, "lm", 12))
        left += 40 + ImageFont.load_default(12).getlength(NAMES.get(condition, condition))
    sheet = sheet.resize((width, height), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(sheet)  # text at its own size: it would blur when scaled
    for x, y, text, colour, anchor, size in words:
        pen.text((x, y), text, fill=colour, anchor=anchor, font=ImageFont.load_default(size))
    return sheet


def _range(rows: Mapping[str, Mapping[str, Measure]], names: Sequence[str]) -> tuple[float, float]:
    """Ends of an axis on which all values, their errors and zero have room."""
    seen = [0.0]
    for measures in rows.values():
        for name in names:
            value, error = measures[name].value, measures[name].standard_error or 0.0
            if value is not None:
                seen += [value - error, value + error]
    room = 0.05 * (max(seen) - min(seen)) or 0.5
    return min(seen) - room, max(seen) + room


def _point(
    draw: ImageDraw.ImageDraw,
    measure: Measure,
    y: float,
    left: float,
    low: float,
    high: float,
    colour: tuple[int, int, int],
) -> None:
    if measure.value is None:
        return
    x = left + (measure.value - low) / (high - low) * PANEL
    error = (measure.standard_error or 0.0) / (high - low) * PANEL
    if error:
        ends = (max(left, x - error), min(left + PANEL, x + error))
        draw.line(_scaled(ends[0], y, ends[1], y), fill=colour, width=2 * FINER)
        for end in ends:
            draw.line(_scaled(end, y - 3, end, y + 3), fill=colour, width=FINER)
    draw.ellipse(_scaled(x - 4, y - 4, x + 4, y + 4), fill=colour)


def _scaled(*values: float) -> list[float]:
    return [value * FINER for value in values]
