"""Prompts for generation: stored samples -> left-padded batches that end with an open response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .chat import asked_alone, exchanges
from .collate import VLMCollator
from .encode import ConversationEncoder, Document
from .schema import IMAGE_MARK, pack_images


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
    if len(pairs) > 1 and encoder.independent(sample):  # a single one stays as it is, as in training
        questions = asked_alone([user for user, _ in pairs])
        asked = [[(question, answer)] for question, (_, answer) in zip(questions, pairs, strict=True)]
    else:
        asked = [pairs[: turn + 1] for turn in range(len(pairs))]
    return [Prompt(index, turn, encoder.prompt(system, a, sample)) for turn, a in enumerate(asked)]


def without_pictures(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The same words about nothing: a stored sample without its pictures and their marks."""
    turns = [
        {**t, "value": t["value"].replace(f"{IMAGE_MARK}\n", "").replace(f"\n{IMAGE_MARK}", "").replace(IMAGE_MARK, "")}
        for t in sample["conversations"]
    ]  # fmt: skip
    return {**sample, "conversations": turns, "images": pack_images([])}


def last_turn(document: Document) -> int:
    """Tokens of a prompt from its last exchange on, the open response included."""
    return len(document) - int((document.turn_ids == document.turn_ids.max()).argmax())


def prompt_batch(collator: VLMCollator, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """Left-padded device batch of some prompts, whatever side training pads."""
    left = VLMCollator(collator.encoder, padding_side="left", pad_to_multiple_of=1)
    return left.layout([p.document for p in prompts])
