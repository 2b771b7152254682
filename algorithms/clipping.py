"""Gradient clipping in which no method's head can shrink the language model's step."""

from __future__ import annotations

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from ..models.errors import UserError
from .base import unwrap


class GradientClippingByPart(Algorithm):
    """Clip the norm of the base model's gradient, and of each method's head, apart.

    Composer's ``GradientClipping`` has one norm for all parameters: a head with large gradients makes the language
    model's step smaller, so two methods that share nothing change each other's training.

    Args:
        clipping_threshold: largest norm of each part.
    """

    def __init__(self, clipping_threshold: float):
        if not clipping_threshold > 0:  # NaN neither
            raise UserError(
                f"algorithms.gradient_clipping_by_part.clipping_threshold: {clipping_threshold} is not positive"
            )
        self.clipping_threshold = float(clipping_threshold)

    def match(self, event: Event, state: State) -> bool:
        """After the gradients of a batch are whole."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip."""
        net = unwrap(state.model).net
        for part in (net.hf, *net.auxiliary.values()):
            torch.nn.utils.clip_grad_norm_(part.parameters(), self.clipping_threshold)
