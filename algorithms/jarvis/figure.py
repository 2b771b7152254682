"""The attention rule as a picture, one panel a step, each made by the mask that the model is given.

python -m opsin.algorithms.jarvis.figure OUT.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ...models.attention import dense
from ...models.randomness import keys
from ...models.visibility import Visibility
from .functional import attention_terms
from .sampler import BLOCKS, CONTEXT, mask_config, sample_masks

GRID, BEFORE, AFTER, PADDING = (8, 8), 2, 4, 2
"""Patches of the picture; words before and after it; padding."""

KEY = 86
"""Of the masks: one with patches of every type."""

TYPES = {
    "text before": (92, 102, 120),
    "context": (62, 145, 88),
    "block 1": (222, 122, 38),
    "both blocks": (148, 76, 160),
    "block 2": (58, 112, 196),
    "unused": (150, 150, 146),
    "text after": (40, 46, 58),
    "padding": (176, 166, 156),
}
"""Types of tokens, as the panels order them, and their colours."""

_CELL, _GAP, _LEFT, _TOP, _TITLE, _PATCH = 4, 18, 78, 70, 22, 13
"""Pixels: of a pair of tokens, between panels, for names of queries, for names of keys, for a title, of a patch below."""
_COLUMNS = 3
_PAPER, _NO, _LINE, _INK = (255, 255, 255), (244, 244, 241), (214, 214, 209), (40, 40, 40)


@dataclass(frozen=True)
class Layout:
    """One row of tokens: words, a masked picture in raster order, words, padding.

    Attributes:
        code: (L,) int16 of each token's patch; 0 elsewhere.
        image: (L,) bool, whether a token shows a patch.
        kind: (L,) int64, ordinal in :data:`TYPES`.
        order: (L,) int64, tokens sorted by type; those of a type stay in their order.
    """

    code: torch.Tensor
    image: torch.Tensor
    kind: torch.Tensor
    order: torch.Tensor


def layout() -> Layout:
    """The figure's tokens; the masks are drawn as for training, with two blocks."""
    config = mask_config({"blocks": 2})
    assert config is not None
    drawn = sample_masks(keys(torch.tensor([KEY])), torch.tensor([GRID]), config)
    words = torch.zeros(BEFORE, dtype=torch.int16), torch.zeros(AFTER + PADDING, dtype=torch.int16)
    code = torch.cat([words[0], drawn, words[1]])
    position = torch.arange(len(code))
    image = (position >= BEFORE) & (position < BEFORE + len(drawn))
    names = list(TYPES)
    kind = torch.full((len(code),), names.index("unused"))
    kind[:BEFORE] = names.index("text before")
    kind[BEFORE + len(drawn) :] = names.index("text after")
    kind[len(code) - PADDING :] = names.index("padding")
    kind[(code & CONTEXT) != 0] = names.index("context")
    for bits, name in ((1, "block 1"), (2, "block 2"), (3, "both blocks")):
        kind[(code & BLOCKS) == bits] = names.index(name)
    return Layout(code, image, kind, kind.argsort(stable=True))


def panels() -> dict[str, torch.Tensor]:
    """Title -> (L, L) bool, whether a query (row) may attend to a key (column), both in :attr:`Layout.order`.

    Each is what ``models.attention.dense`` gives for these tokens, before they are sorted.
    """
    shown = layout()
    padding = shown.kind == list(TYPES).index("padding")
    plain = Visibility(
        valid=~padding[None],
        document=torch.where(padding, -1, 0)[None],
        branch=torch.zeros(1, len(padding), dtype=torch.int64),
        image=torch.where(shown.image, 0, -1)[None],
    )
    both_ways = plain.with_terms(bidirectional=shown.image[None])
    code, scope = shown.code[None], plain.image

    def masked(code: torch.Tensor = code, **options: Any) -> Visibility:
        return both_ways.with_terms(**attention_terms(code, scope, **options))

    steps = {
        "1  causal": plain,
        "2  image in both directions": both_ways,
        "3  patches see the context alone": masked(code & ~BLOCKS),
        "4  ... and their own block: JARVIS": masked(),
        "4 with hide_unused": masked(hide_unused=True),
        "4 with see_pretext": masked(preceding=~shown.image[None]),
    }
    order = shown.order
    return {title: dense(see)[0, 0][order][:, order] for title, see in steps.items()}


def draw() -> Image.Image:
    """The figure: all panels, and below them where the types lie in the picture."""
    shown, made, font = layout(), panels(), ImageFont.load_default(11)
    kind = shown.kind[shown.order]
    side = _CELL * len(kind)
    rows = -(-len(made) // _COLUMNS)
    legend = _PATCH * GRID[0] + 2 * _GAP
    width = _LEFT + _COLUMNS * (side + _GAP)
    sheet = Image.new("RGB", (width, rows * (_TOP + _TITLE + side + _GAP) + legend), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (title, allowed) in enumerate(made.items()):
        left, top = panel_corner(number, side)
        pen.text((left, top - _TOP - _TITLE + 6), title, fill=_INK, font=ImageFont.load_default(13))
        sheet.paste(Image.fromarray(panel(allowed, kind)), (left, top))
        _names(sheet, kind, left, top, rows_too=number % _COLUMNS == 0)
    _legend(sheet, shown, sheet.height - legend + _GAP)
    pen.multiline_text(
        (_LEFT + _PATCH * GRID[1] + 130, sheet.height - legend + _GAP),
        "Rows are queries, columns keys. In a coloured cell the query may attend to the\n"
        "key; the colour tells the query's type. Tokens are sorted by type for this figure\n"
        "alone, and those of one type stand in the order in which the model has them:\n"
        "that is why the causal panel is made of stairs.",
        fill=_INK, font=font, spacing=5,
    )  # fmt: skip
    return sheet


def panel_corner(number: int, side: int) -> tuple[int, int]:
    """Left and top pixel of a panel's cells."""
    row, column = divmod(number, _COLUMNS)
    return _LEFT + column * (side + _GAP), _TOP + _TITLE + row * (_TOP + _TITLE + side + _GAP)


def panel(allowed: torch.Tensor, kind: torch.Tensor) -> np.ndarray:
    """Cells (L, L) bool in the colours of their queries' types (L,), a line between types: (side, side, 3) uint8."""
    colours = torch.tensor(list(TYPES.values()), dtype=torch.uint8)[kind]
    cells = torch.where(allowed[..., None], colours[:, None], torch.tensor(_NO, dtype=torch.uint8))
    pixels = cells.repeat_interleave(_CELL, 0).repeat_interleave(_CELL, 1)
    line = torch.tensor(_LINE, dtype=torch.uint8)
    for start in ((kind[1:] != kind[:-1]).nonzero().squeeze(1) + 1).tolist():
        pixels[start * _CELL] = line
        pixels[:, start * _CELL] = line
    return pixels.numpy()


def _names(sheet: Image.Image, kind: torch.Tensor, left: int, top: int, rows_too: bool) -> None:
    """Names of the types along the axes of a panel."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (name, colour) in enumerate(TYPES.items()):
        at = (kind == number).nonzero().squeeze(1).float()
        middle = round((float(at.mean()) + 0.5) * _CELL)
        if rows_too:
            pen.text((left - 6, top + middle), name, fill=colour, font=font, anchor="rm")
        upright = Image.new("RGB", (_TOP, 14), _PAPER)
        ImageDraw.Draw(upright).text((4, 7), name, fill=colour, font=font, anchor="lm")
        sheet.paste(upright.transpose(Image.Transpose.ROTATE_90), (left + middle - 7, top - _TOP))


def _legend(sheet: Image.Image, shown: Layout, top: int) -> None:
    """The picture's patches in the colours of their types, and the names of these."""
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    colours = list(TYPES.values())
    for place, number in enumerate(shown.kind[shown.image].tolist()):
        row, column = divmod(place, GRID[1])
        corner = (_LEFT + column * _PATCH, top + row * _PATCH)
        pen.rectangle((*corner, corner[0] + _PATCH - 2, corner[1] + _PATCH - 2), fill=colours[number])
    present = sorted(set(shown.kind[shown.image].tolist()))
    for line, number in enumerate(present):
        left, middle = _LEFT + GRID[1] * _PATCH + 14, top + 10 + 20 * line
        pen.rectangle((left, middle - 5, left + 10, middle + 5), fill=colours[number])
        pen.text((left + 18, middle), list(TYPES)[number], fill=_INK, font=font, anchor="lm")


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description="JARVIS's attention rule, one panel a step.")
    parser.add_argument("out", type=Path, help="a PNG")
    draw().save(parser.parse_args().out, "PNG", optimize=True)


if __name__ == "__main__":
    main()
