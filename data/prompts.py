"""Prompts for generation: stored samples -> left-padded batches that end with an open response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .chat import exchanges
from .collate import VLMCollator
from .encode import ConversationEncoder, Document
from .schema import IMAGE_MARK


@dataclass(frozen=True)
class Prompt:
    """One question to be answered: which sample and exchange it is, and its tokens."""

    sample: int
    turn: int
    document: Document


def prompts_of(encoder: ConversationEncoder, sample: dict[str, Any], index: int = 0) -> list[Prompt]:
    """A prompt for each exchange of a stored sample.

    Independent turns are asked alone, each with the pictures; chained ones with the gold exchanges before them.
    Responses of the stored sample are never part of their own prompt.
    """
    system, pairs = exchanges(sample["conversations"])
    independent = (sample.get("meta") or {}).get("turns") == "independent"
    marks = f"{IMAGE_MARK}\n" * pairs[0][0].count(IMAGE_MARK)
    prompts = []
    for turn, (user, answer) in enumerate(pairs):
        alone = [(user if turn == 0 else marks + user, answer)]
        asked = alone if independent else pairs[: turn + 1]
        prompts.append(Prompt(index, turn, encoder.prompt(system, asked, sample)))
    return prompts


def prompt_batch(collator: VLMCollator, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Left-padded device batch of some prompts, whatever side training pads."""
    left = VLMCollator(collator.encoder, padding_side="left", pad_to_multiple_of=1)
    return left.layout([p.document for p in prompts])
