"""Multiple choice with rolled options (MMBench's circular evaluation, arXiv 2307.06281)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.errors import UserError
from .base import Measure, counted
from .groups import all_right, grouped, needed
from .letters import Letter, options_of

ROLL = 10**6
"""``meta.index`` of a rolled copy is that of its question plus a multiple of this."""


class MMBench(Letter):
    """``mmbench``: ``circular_accuracy``, a question is right if every copy with rolled options is.

    A question with fewer copies than options is left out and counted in ``incomplete_questions``: over one copy circular
    accuracy is but accuracy. ``accuracy`` is that of single copies. Answers are read as letters; lmms-eval's
    ``mmbench_en_dev_static`` (the number to compare with) also takes answers that contain one option's text.
    """

    name = "mmbench"
    primary = "circular_accuracy"

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """As the class says."""
        questions = grouped(marked, _question)
        whole = [copies for copies in questions if len(copies) >= options_of(copies[0])[0]]
        return {
            "circular_accuracy": all_right(whole),
            "incomplete_questions": counted(len(questions) - len(whole), len(questions)),
            **super().measures(marked),
        }


def _question(record: Mapping[str, Any]) -> int:
    index = needed(record, "index")
    try:
        return int(index) % ROLL
    except (TypeError, ValueError):
        where = f"suite {record.get('suite')}, {record.get('id')}"
        raise UserError(f"{where}: meta.index should be a whole number, got {index!r}") from None
