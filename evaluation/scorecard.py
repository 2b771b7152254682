"""The table at the end of a run: accuracy by kind of question, beside what the same model scores blind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from ..data.collate import VLMCollator
from ..models.vlm import VisionLanguageModel
from .blind import Majority, with_blank_pictures, with_other_pictures
from .packed import Scored, score


def scorecard(
    model: VisionLanguageModel,
    collator: VLMCollator,
    samples: Sequence[dict[str, Any]],
    *,
    majority: Majority | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, float | int | None]]:
    """Exact-match accuracy by kind of question, 0 .. 1.

    Args:
        model: the trained model.
        collator: of its training.
        samples: held-out samples (stored form).
        majority: fitted on the training samples.
        batch_size: pictures a forward pass.

    Returns:
        kind -> ``n`` questions, ``trained``, ``blind`` (the picture of another sample), ``blind_blank`` (a grey
        picture), ``majority`` (no picture, no model), ``standard_error`` of ``trained``; and ``all``.
    """
    rows = {
        "trained": score(model, collator, samples, batch_size=batch_size),
        "blind": score(model, collator, with_other_pictures(samples), batch_size=batch_size),
        "blind_blank": score(model, collator, with_blank_pictures(samples), batch_size=batch_size),
    }
    if majority is not None:
        used = {s.id for s in rows["trained"]}
        rows["majority"] = [
            Scored(sample["id"], turn, kind, right)
            for sample in samples
            if sample["id"] in used
            for turn, (right, kind) in enumerate(zip(majority.right(sample), _kinds(sample), strict=True))
        ]
    kinds = sorted({s.kind for s in rows["trained"]})
    card: dict[str, dict[str, float | int | None]] = {}
    for kind in [*kinds, "all"]:
        picked = {name: [s.right for s in scored if kind in (s.kind, "all")] for name, scored in rows.items()}
        n = len(picked["trained"])
        accuracy = {name: (sum(v) / len(v) if v else None) for name, v in picked.items()}
        trained = accuracy["trained"] or 0.0
        card[kind] = {
            "n": n,
            **accuracy,
            "majority": accuracy.get("majority"),
            "standard_error": math.sqrt(trained * (1 - trained) / n) if n else None,
        }
    return card


def _kinds(sample: dict[str, Any]) -> list[str]:
    return [
        str(k)
        for k in (sample.get("meta") or {}).get("kinds") or ["all"] * (len(sample["conversations"]) // 2)
    ]


def as_table(card: dict[str, dict[str, Any]], title: str) -> Table:
    """The scorecard for a terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("kind")
    columns = {
        "n": "n",
        "trained": "trained",
        "blind": "blind: another picture",
        "blind_blank": "blind: blank picture",
        "majority": "majority answer",
    }
    for header in columns.values():
        table.add_column(header, justify="right")
    for kind, row in card.items():
        cells = [str(row["n"]), *(_percent(row.get(c)) for c in list(columns)[1:])]
        if row.get("standard_error") is not None:
            cells[1] += f" ±{row['standard_error']:.2f}"
        table.add_row(kind, *cells, end_section=kind == list(card)[-2] if len(card) > 1 else False)
    return table


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"
