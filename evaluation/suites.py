"""A suite: named questions, how they are asked, and who scores the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .records import Item
from .scorers.base import Scorer

GROUPS = (
    "general",
    "2d",
    "3d",
    "chart_ocr",
    "captioning",
    "hallucination",
    "reasoning",
    "text_only",
)
"""Groups of suites, as the papers print their tables."""


@dataclass(frozen=True)
class Suite:
    """What is asked and how it is scored.

    Attributes:
        group: one of ``GROUPS``.
        scorer: of the answers.
        load: reads the items; called once, on every rank, with the same result.
        mode: ``generate`` (greedy words), ``rank`` (the likeliest of ``Item.choices``) or ``follow``: the right answer is
            given to the model word by word, and its output ends with the first word that it would have said instead. All
            questions about a picture share one pass, so it is several times faster than ``generate``; whether an answer
            is right is the same, an answer of one token, too. A prediction has its ``nll`` (nats).
        max_new_tokens: longest answer.
    """

    group: str
    scorer: Scorer
    load: Callable[[], Sequence[Item]]
    mode: str = "generate"
    max_new_tokens: int = 16
