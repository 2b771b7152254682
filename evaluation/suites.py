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
        mode: ``generate`` (greedy words) or ``rank`` (the likeliest of ``Item.choices``).
        max_new_tokens: longest answer.
    """

    group: str
    scorer: Scorer
    load: Callable[[], Sequence[Item]]
    mode: str = "generate"
    max_new_tokens: int = 16
