"""The table at the end of a run: accuracy by kind of question, beside what the same model scores blind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from ..algorithms.vift.fusion import Fusion
from ..data.collate import VLMCollator
from ..data.prompts import without_pictures
from ..models.vlm import VisionLanguageModel
from .blind import Majority, with_blank_pictures, with_other_pictures
from .fused import score_fused
from .packed import Scored, score
from .questions import UNNAMED, questions
from .ranks import on_all_ranks
from .usable import Usable, usable


def scorecard(
    model: VisionLanguageModel,
    collator: VLMCollator,
    samples: Sequence[dict[str, Any]] | Usable,
    *,
    majority: Majority | None = None,
    batch_size: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
    fusion: Fusion | None = None,
) -> dict[str, dict[str, float | int | None]]:
    """Exact-match accuracy by kind of question, 0 .. 1. Every rank calls this with the same samples.

    Args:
        model: the trained model.
        collator: of its training.
        samples: held-out samples (stored form), or what ``usable`` made of them.
        majority: fitted on the training samples.
        batch_size: pictures a forward pass.
        progress: called after each forward pass with (row, passes done, passes) of this rank.
        fusion: also score answers under ability fusion, and the questions alone, whose states it adds.

    Returns:
        kind -> ``n`` questions, ``trained``, ``blind`` (the picture of another sample), ``n_blind`` (questions
        of the blind row: fewer where no other picture is to be had, or none with it fits), ``blind_blank`` (a
        grey picture), ``majority`` (no picture, no model), ``standard_error`` of ``trained``; with ``fusion`` also
        ``fused`` and ``no_picture`` (the question alone, no fusion); and ``all``. An accuracy over no question is None.
    """
    used = (samples if isinstance(samples, Usable) else usable(collator.encoder, samples)).samples

    def scored(part: list[dict[str, Any]]) -> list[Scored]:
        return score(model, collator, part, batch_size=batch_size)

    def told(row: str) -> Callable[[int, int], None] | None:
        return None if progress is None else partial(progress, row)

    rows = {
        "trained": on_all_ranks(used, scored, batch_size, told("trained")),
        "blind": on_all_ranks(with_other_pictures(used), scored, batch_size, told("blind")),
        "blind_blank": on_all_ranks(
            used, lambda part: scored(with_blank_pictures(part)), batch_size, told("blind_blank")
        ),
    }
    if fusion is not None:
        rows["fused"] = on_all_ranks(
            used,
            lambda part: score_fused(model, collator, part, fusion, batch_size=batch_size),
            batch_size,
            told("fused"),
        )
        rows["no_picture"] = on_all_ranks(
            used, lambda part: scored([without_pictures(s) for s in part]), batch_size, told("no_picture")
        )
    if majority is not None:
        rows["majority"] = [
            Scored(sample["id"], turn, kind, majority.answer(question, kind) == answer)
            for sample in used
            for turn, (question, answer, kind) in enumerate(questions(sample))
        ]
    kinds = sorted({s.kind for s in rows["trained"]} - {UNNAMED})
    card: dict[str, dict[str, float | int | None]] = {}
    for kind in [*kinds, UNNAMED]:
        picked = {name: [s.right for s in row if kind in (s.kind, UNNAMED)] for name, row in rows.items()}
        n = len(picked["trained"])
        accuracy = {name: (sum(v) / len(v) if v else None) for name, v in picked.items()}
        trained = accuracy["trained"] or 0.0
        card[kind] = {
            "n": n,
            **accuracy,
            "n_blind": len(picked["blind"]),
            "majority": accuracy.get("majority"),
            "standard_error": math.sqrt(trained * (1 - trained) / n) if n else None,
        }
    return card


def as_table(card: dict[str, dict[str, Any]], title: str) -> Table:
    """The scorecard for a terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("kind")
    columns = {
        "n": "n",
        "trained": "trained",
        **(
            {"fused": "fused", "no_picture": "blind: no picture"}
            if "fused" in next(iter(card.values()), {})
            else {}
        ),
        "blind": "blind: another picture",
        "blind_blank": "blind: blank picture",
        "majority": "majority answer",
    }
    for header in columns.values():
        table.add_column(header, justify="right")
    for kind, row in card.items():
        cells = [str(row["n"]), *(_percent(row.get(c)) for c in list(columns)[1:])]
        if row.get("n_blind", row["n"]) != row["n"]:
            cells[list(columns).index("blind")] += f" (n {row['n_blind']})"
        if row.get("standard_error") is not None:
            cells[1] += f" ±{row['standard_error']:.2f}"
        table.add_row(kind, *cells, end_section=kind == list(card)[-2] if len(card) > 1 else False)
    return table


def _percent(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"
