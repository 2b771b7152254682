"""The figure of JARVIS's attention rule: each panel against the fact sheet's table, type by type."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.algorithms.jarvis import figure

COMMITTED = Path(figure.__file__).with_name("attention.png")
BLOCKS_OF = {"block 1": {1}, "both blocks": {1, 2}, "block 2": {2}}
PATCHES = {"context", "unused", *BLOCKS_OF}

# Fact sheet, 3.2: query -> what it sees of each type of keys; "+": those that don't come later. Targets see
# themselves and whom they share a block with. Padding sees itself here, so that no softmax runs over nothing.
AFTER = {"text before": "yes", "text after": "+", **dict.fromkeys(PATCHES, "yes")}
JARVIS = {
    "text before": {"text before": "+"},
    "context": {"context": "yes"},
    "unused": {"context": "yes"},
    "text after": AFTER,
    "padding": {"padding": "itself"},
    **{
        one: {"context": "yes", **{two: "yes" for two in BLOCKS_OF if BLOCKS_OF[one] & BLOCKS_OF[two]}}
        for one in BLOCKS_OF
    },
}


def _with(base: dict, types: set[str], more: dict[str, str]) -> dict:
    return {query: {**seen, **more} if query in types else seen for query, seen in base.items()}


CAUSAL = {
    **dict.fromkeys({"text before", "text after", *PATCHES}, dict.fromkeys({*AFTER}, "+")),
    "padding": {"padding": "itself"},
}
TABLES = [
    CAUSAL,
    _with(CAUSAL, PATCHES, dict.fromkeys(PATCHES, "yes")),
    _with(JARVIS, set(BLOCKS_OF), dict.fromkeys(BLOCKS_OF, "no")),
    JARVIS,
    {**JARVIS, "text after": {key: seen for key, seen in AFTER.items() if key != "unused"}},
    _with(JARVIS, PATCHES, {"text before": "yes"}),
]


@pytest.mark.parametrize("number", range(len(TABLES)))
def test_a_panel_is_the_sheets_table(number: int) -> None:
    shown, made = figure.layout(), list(figure.panels().values())
    assert len(made) == len(TABLES)
    names, order = list(figure.TYPES), shown.order.tolist()
    wanted = torch.zeros(len(order), len(order), dtype=torch.bool)
    for i, q in enumerate(order):
        for j, k in enumerate(order):
            seen = TABLES[number][names[int(shown.kind[q])]].get(names[int(shown.kind[k])], "no")
            wanted[i, j] = {"yes": True, "no": False, "+": k <= q, "itself": k == q}[seen]
    assert torch.equal(made[number], wanted)


def test_the_layout_has_tokens_of_every_type_sorted_by_type() -> None:
    shown = figure.layout()
    counts = torch.bincount(shown.kind, minlength=len(figure.TYPES))
    assert counts.min() >= 2 and counts.sum() == 64 + figure.BEFORE + figure.AFTER + figure.PADDING
    sorted_kinds = shown.kind[shown.order]
    assert torch.equal(sorted_kinds, sorted_kinds.sort().values)
    assert shown.image.nonzero().squeeze(1).tolist() == list(range(2, 66))
    for number in range(len(figure.TYPES)):
        assert (shown.order[sorted_kinds == number].diff() > 0).all()


def test_a_panel_is_drawn_cell_by_cell() -> None:
    shown, made = figure.layout(), list(figure.panels().values())[3]
    kind = shown.kind[shown.order]
    cells = figure.panel(made, kind)[2::4, 2::4]
    colours = np.array(list(figure.TYPES.values()))[kind]
    assert (cells == colours[:, None]).all(-1).tolist() == made.tolist()


def test_the_command_writes_the_committed_picture_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again.png"
    monkeypatch.setattr("sys.argv", ["figure", str(out)])
    runpy.run_module(figure.__name__, run_name="__main__")
    with Image.open(out) as again, Image.open(COMMITTED) as committed:
        assert np.array_equal(np.asarray(again), np.asarray(committed))
    assert COMMITTED.stat().st_size < 60_000
