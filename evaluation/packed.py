"""Exact-match scoring of many questions by one forward pass a picture, without generating.

Questions that share a picture lie in one row as branches (``data.encode``); an answer counts when each of its
tokens, the end-of-answer token included, is the likeliest one after the gold tokens before it. That is
exactly when greedy decoding gives the answer (``models.metrics.ExactMatch``), which a test holds on a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.batch import split_batch, to_device
from ..data.chat import BadConversation
from ..data.collate import VLMCollator
from ..data.encode import Rejected
from ..models.metrics import answers_right
from ..models.step import Step
from ..models.vlm import VisionLanguageModel
from .questions import kinds_of


@dataclass(frozen=True)
class Scored:
    """One question: its sample, its turn, its kind, and whether the answer was right."""

    id: str
    turn: int
    kind: str
    right: bool


def score(
    model: VisionLanguageModel,
    collator: VLMCollator,
    samples: Sequence[dict[str, Any]],
    *,
    batch_size: int = 16,
) -> list[Scored]:
    """Score every question of ``samples`` (stored form), in order; samples that cannot be used are left out.

    Args:
        model: in any mode; it is evaluated and put back.
        collator: its encoder and template are those of training; packing is not used.
        batch_size: pictures a forward pass.
    """
    plain = VLMCollator(collator.encoder, pad_to_multiple_of=collator.pad_to_multiple_of)
    mode = model.training
    model.eval()
    device = next(model.parameters()).device
    scored: list[Scored] = []
    try:
        for start in range(0, len(samples), batch_size):
            chunk = list(samples[start : start + batch_size])
            documents, asked = [], []
            for sample in chunk:
                try:
                    document = collator.encoder(sample)
                    fitting = len(sample["conversations"]) // 2 - document.truncated_turns
                    kinds = kinds_of(sample, fitting)
                except (Rejected, BadConversation):
                    continue
                documents.append(document)
                asked.append((sample["id"], kinds))
            if not documents:
                continue
            batch = plain.layout(documents)
            batch["sample_status"] = torch.zeros(len(documents), dtype=torch.int8)
            micro = to_device(split_batch(batch, None, training=False)[0], device)
            with torch.no_grad():
                outputs = model.net(micro, Step(micro))
            right = iter(answers_right(outputs, micro).tolist())
            for name, kinds in asked:
                for turn, kind in enumerate(kinds):
                    scored.append(Scored(name, turn, kind, bool(next(right))))
    finally:
        model.train(mode)
    return scored
