"""Exact-match scoring of answers given under ability fusion: by generating them, for fusion is about prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..algorithms.vift.fusion import Fusion
from ..data.collate import VLMCollator
from ..models.vlm import VisionLanguageModel
from .adapter import VLMAdapter
from .packed import Scored
from .questions import questions


def score_fused(
    model: VisionLanguageModel,
    collator: VLMCollator,
    samples: Sequence[dict[str, Any]],
    fusion: Fusion | None,
    *,
    batch_size: int = 64,
) -> list[Scored]:
    """Score every question of ``samples`` (stored form, all of them usable), in order.

    Args:
        model: in any mode; it is evaluated and put back.
        collator: of its training.
        fusion: how; None: plain greedy answers, which score as ``packed.score`` says.
        batch_size: questions a call of ``generate``.
    """
    gold = [questions(sample) for sample in samples]
    tokenizer = collator.encoder.tokenizer
    answers = [answer for asked in gold for _, answer, _ in asked]
    lengths = (
        [len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]] if answers else [0]
    )
    # One token more than the longest right answer: whatever comes after it is wrong, or the end.
    adapter = VLMAdapter(
        model, collator, max_new_tokens=max(lengths) + 1, batch_size=batch_size, fusion=fusion
    )
    said = adapter.generate(samples)
    return [
        Scored(sample["id"], turn, kind, text == answer)
        for sample, asked, texts in zip(samples, gold, said, strict=True)
        for turn, ((_, answer, kind), text) in enumerate(zip(asked, texts, strict=True))
    ]
