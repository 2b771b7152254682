"""Metrics over labelled tokens and whole answers; states add up over ranks, uneven batches included."""

from __future__ import annotations

from typing import Any

import torch
from torchmetrics import Metric


class TokenNLL(Metric):
    """Mean negative log-likelihood of labelled tokens, nats."""

    full_state_update = False
    total: torch.Tensor
    tokens: torch.Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: dict[str, torch.Tensor], batch: dict) -> None:
        """Add one micro-batch."""
        real = batch["label_weights"] > 0
        self.total += outputs["nll"].double().masked_fill(~real, 0).sum()
        self.tokens += real.sum()

    def compute(self) -> torch.Tensor:
        """Nats a token."""
        return (self.total / self.tokens.clamp(min=1)).float()


class ExactMatch(Metric):
    """Share of answers of which every token is the likeliest one: exactly those that greedy decoding gives.

    (If each gold token is the arg-max after the gold tokens before it, greedy decoding produces them one by
    one; if one is not, it leaves the gold answer there.)
    """

    full_state_update = False
    right: torch.Tensor
    answers: torch.Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("right", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("answers", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: dict[str, torch.Tensor], batch: dict) -> None:
        """Add one micro-batch."""
        right = answers_right(outputs, batch)
        self.right += right.sum()
        self.answers += right.numel()

    def compute(self) -> torch.Tensor:
        """Share in [0, 1]."""
        return (self.right / self.answers.clamp(min=1)).float()


def answers_right(outputs: dict[str, torch.Tensor], batch: dict) -> torch.Tensor:
    """(A,) bool: whether each answer of the micro-batch is right; answers in order of ``label_answer``."""
    answers = int(batch["answers"])
    wrong = torch.zeros(answers, dtype=torch.long, device=outputs["nll"].device)
    inside = batch["label_answer"] >= 0
    wrong.index_add_(0, batch["label_answer"][inside], (~outputs["correct"][inside]).long())
    return wrong == 0
