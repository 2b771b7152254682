"""One picture sheet: held-out pictures with question, gold and predicted answer."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..data.schema import unpack_images
from .questions import questions

CELL, TEXT, MARGIN = 224, 86, 12
"""Pixels: side of a picture, height of the text below it, space around."""


def sample_sheet(
    samples: Sequence[dict[str, Any]], predicted: Sequence[Sequence[str]], path: str | Path, columns: int = 4
) -> Path:
    """Draw the first question of each sample with its picture, gold and predicted answer.

    Args:
        samples: stored samples with at least one picture.
        predicted: for each sample, the model's answers by exchange.
        path: PNG to write.
        columns: pictures a row.
    """
    rows = -(-len(samples) // columns)
    width, height = MARGIN + columns * (CELL + MARGIN), MARGIN + rows * (CELL + TEXT + MARGIN)
    sheet = Image.new("RGB", (width, height), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    small, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    for i, (sample, answers) in enumerate(zip(samples, predicted, strict=True)):
        left = MARGIN + i % columns * (CELL + MARGIN)
        top = MARGIN + i // columns * (CELL + TEXT + MARGIN)
        encoded = unpack_images(sample["images"])
        if encoded:
            with Image.open(io.BytesIO(encoded[0])) as picture:
                shown = picture.convert("RGB")
                shown.thumbnail((CELL, CELL))
                if max(shown.size) < CELL:
                    scale = CELL / max(shown.size)
                    shown = shown.resize(
                        (round(shown.width * scale), round(shown.height * scale)), Image.Resampling.LANCZOS
                    )
                sheet.paste(shown, (left, top))
        turn = i % len(answers)
        question, gold, _ = questions(sample)[turn]
        said = answers[turn].strip()
        right = said == gold
        for line, text in enumerate(textwrap.wrap(question, 32)[:3]):
            draw.text((left, top + CELL + 4 + 16 * line), text, fill=(40, 40, 40), font=small)
        verdict = f"{said or '(nothing)'}" + ("" if right else f"   (gold: {gold})")
        colour = (20, 120, 50) if right else (190, 40, 40)
        draw.text((left, top + CELL + 56), verdict[:36], fill=colour, font=bold)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
