"""Sheet of occluded pictures: as it is, asked object painted over, elsewhere painted over, with log-likelihoods."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from .holes import Box
from .line_plot import COLOURS, INK, PALE, PAPER
from .scorers.base import Measure

CELL, WORDS, MARGIN, HEAD, LINE = 200, 230, 14, 56, 22
"""Pixels: side of a picture, width of the words, space around, height of the head and of a line below a picture."""
TITLES = {
    "picture": "as it is",
    "object": "asked objects painted over",
    "elsewhere": "equal area elsewhere painted over",
}


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        question, answer: words.
        pictures: of ``occlusion.PICTURES``: encoded.
        objects, elsewhere: boxes in pixels.
        nats: of ``occlusion.PICTURES``: log-likelihood of the answer.
    """

    question: str
    answer: str
    pictures: Mapping[str, bytes]
    objects: Sequence[Box]
    elsewhere: Sequence[Box]
    nats: Mapping[str, float]


def occlusion_sheet(examples: Sequence[Example], measures: Mapping[str, Measure]) -> Image.Image:
    """A row an example; above them the means over all questions.

    Args:
        examples: some questions.
        measures: of ``Occlusion.measures``.
    """
    width = WORDS + 3 * (CELL + MARGIN) + 2 * MARGIN
    height = HEAD + MARGIN + len(examples) * (CELL + LINE + MARGIN)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    small, plain, bold = (ImageFont.load_default(size) for size in (11, 13, 15))
    for column, (name, title) in enumerate(TITLES.items()):
        left = WORDS + MARGIN + column * (CELL + MARGIN)
        draw.text((left, 10), title, fill=INK, font=plain)
        if name != "picture":
            draw.text((left, 30), "mean " + _with_error(measures[f"change/{name}"]), fill=PALE, font=small)
    draw.text((MARGIN, 10), "difference " + _with_error(measures["difference"]), fill=INK, font=plain)
    draw.text((MARGIN, 30), f"{measures['difference'].n} questions", fill=PALE, font=small)
    for row, example in enumerate(examples):
        top = HEAD + row * (CELL + LINE + MARGIN)
        lines = textwrap.wrap(example.question, 32)[:7]
        for i, line in enumerate(lines):
            draw.text((MARGIN, top + 4 + 17 * i), line, fill=INK, font=plain)
        draw.text((MARGIN, top + 12 + 17 * len(lines)), example.answer[:26], fill=COLOURS[2], font=bold)
        for column, name in enumerate(TITLES):
            left = WORDS + MARGIN + column * (CELL + MARGIN)
            holes = {"object": example.objects, "elsewhere": example.elsewhere}.get(name, ())
            sheet.paste(
                _framed(example.pictures[name], holes, COLOURS[1 if name == "object" else 0]), (left, top)
            )
            text = f"log p = {example.nats[name]:.2f} nats"
            if name != "picture":
                text += f"  ({example.nats[name] - example.nats['picture']:+.2f})"
            draw.text((left, top + CELL + 4), text, fill=INK, font=plain)
    return sheet


def _with_error(measure: Measure) -> str:
    if measure.value is None:
        return "-"
    error = "" if measure.standard_error is None else f" ± {measure.standard_error:.2f}"
    return f"{measure.value:+.2f}{error} nats"


def _framed(encoded: bytes, boxes: Sequence[Box], colour: tuple[int, int, int]) -> Image.Image:
    """A picture fitted into a cell, with a thin frame around each hole."""
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    with Image.open(io.BytesIO(encoded)) as picture:
        scale = CELL / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        cell.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (0, 0))
    draw = ImageDraw.Draw(cell)
    for left, top, right, bottom in boxes:
        draw.rectangle([left * scale - 1, top * scale - 1, right * scale, bottom * scale], outline=colour)
    return cell
