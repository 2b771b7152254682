"""Methods that exist for tests: one with a head and a loss of its own, one that never counts as off."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from opsin.algorithms.base import VisionAlgorithm
from opsin.algorithms.l2t import L2T
from opsin.models.net import nan_safe_zero
from opsin.models.normalise import declare, term
from opsin.models.step import FINAL


class NeverOffL2T(L2T):
    """Runs its whole code at weight 0, where the real one does nothing."""

    def is_off(self) -> bool:
        return False


class Read(nn.Module):
    """A linear read-out of visual hidden states."""

    def __init__(self, width: int):
        super().__init__()
        self.line = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x)


class MeanColour(VisionAlgorithm):
    """Predicts the mean colour of each patch from the language model's output: head, tap, own loss, own count."""

    name: ClassVar[str] = "mean_colour"
    loss_keys: ClassVar[tuple[str, ...]] = ("mean_colour",)
    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    def __init__(self, weight: float = 1.0, layer: int = FINAL, lr: float | None = None):
        self.weight, self.layer, self.lr = weight, layer, lr

    def is_off(self) -> bool:
        return self.weight == 0

    def init(self, model: Any, state: Any, logger: Any) -> None:
        width = model.hf.config.get_text_config().hidden_size
        self.attach(state, lambda: Read(width), lr=self.lr)

    def batch_start(self, model: Any, state: Any, logger: Any) -> None:
        declare(state.batch, self.name, state.batch["view_grid"].prod(1).sum())

    def before_forward(self, model: Any, state: Any, logger: Any) -> None:
        model.step(state.batch).taps.add(self.layer)

    def after_loss(self, model: Any, state: Any, logger: Any) -> None:
        batch, step = state.batch, model.step(state.batch)
        hidden, head = step.tapped[self.layer], model.net.auxiliary[self.name]
        positions = batch["patch_position"]
        if len(positions) == 0:
            local = nan_safe_zero(head(hidden.flatten(0, 1)[:1]))
        else:
            pictures = [
                p.unflatten(1, (g[0], -1)).unflatten(3, (g[1], -1))
                for p, g in zip(model.pictures(batch), batch["view_grid"].tolist(), strict=True)
            ]
            target = torch.cat([p.mean((2, 4)).flatten(1).T for p in pictures])
            local = (head(hidden.flatten(0, 1)[positions]) - target).square().sum()
        state.loss[self.name] = self.weight * term(local, self.name, batch)
