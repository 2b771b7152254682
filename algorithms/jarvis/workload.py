"""What JARVIS adds to a step: its head at the targets, a second pass where words see the whole image, the teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn

from ...models.vlm import VisionLanguageModel
from ..workload import Grids, Workload
from .functional import prediction_losses
from .heads import JarvisHead
from .jarvis import JARVIS

TARGETS, CONTEXT = 0.45, 0.45
"""Shares of the patches that are predicted, and that remain as context, with the default masks (a mean of many draws)."""


def workload(algorithm: JARVIS, model: VisionLanguageModel) -> Workload:
    """After INIT; see :class:`Workload`. Shares of patches are those of the default masks."""
    masked = algorithm.masks is not None
    text = model.hf.config.get_text_config()
    dim = algorithm.built_target.dim
    deviation = getattr(text, "initializer_range", 0.02)
    make = partial(JarvisHead, algorithm.head, text.hidden_size, dim, deviation, masked)
    share = TARGETS if masked else 1.0

    def loss(grids: Grids) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        count = max(1, round(share * sum(rows * columns for rows, columns in grids)))

        def of_head(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            predicted = cast(JarvisHead, head).predict(hidden[:count])
            return prediction_losses(
                predicted, torch.empty(count, dim, device=hidden.device), algorithm.loss
            ).sum()

        return of_head

    second = algorithm.tap if algorithm.branch else 0
    return Workload(
        make,
        loss,
        algorithm.built_target,
        share=1 - algorithm.ntp_probability,
        layers=second,
        tokens=TARGETS + CONTEXT if second else 0.0,
    )
