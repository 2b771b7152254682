"""What methods share that predict a frozen function of each patch: the function itself, and whether it is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from composer.core import State
from torch import nn

from ..data.patch_targets import LATENTS, use_stored
from ..models.targets import Target
from ..models.vlm import VisionLanguageModel
from .base import VisionAlgorithm


class PredictsTarget(VisionAlgorithm):
    """A method with a :class:`~opsin.models.targets.Target`, built at INIT.

    Class attributes:
        store_command: that computes its targets once.
    """

    store_command: ClassVar[str] = LATENTS
    target: Target | None = None
    stored: str = "auto"
    _placed: torch.device | None = None
    _take_stored: bool = True

    @property
    def built_target(self) -> Target:
        """The target, once it is built (at INIT)."""
        assert self.target is not None, "the target is built at INIT"
        return self.target

    @property
    def takes_stored(self) -> bool:
        """Whether targets are taken from the data; known for certain when fitting has started."""
        return self._take_stored

    def prepare(self, model: VisionLanguageModel, seed: int) -> Callable[[], nn.Module]:
        """Build the target for a model; the function that makes the method's head for it.

        Raises:
            UserError: target, settings and model do not fit.
        """
        raise NotImplementedError(f"{type(self).__name__}.prepare")

    def set_target(self, target: Target) -> None:
        """A target has been built."""
        self.target, self._placed = target, None
        self._take_stored = self.stored != "ignore"

    def placed_target(self, device: torch.device) -> Target:
        """The target on a device; it goes there when it is first used, which it never is where targets are stored."""
        if self._placed != device:
            self.built_target.to(device)
            self._placed = device
        return self.built_target

    def look_for_stored(self, state: State) -> None:
        """Check the targets that the dataset brings, and decide whether they are taken.

        Raises:
            UserError: they are required and not there, or those of another function or geometry.
        """
        loader: Any = state.train_dataloader
        self._take_stored = use_stored(
            loader,
            self.name,
            self.stored,
            self.built_target.identity,
            f"algorithms.{self.name}",
            self.store_command,
        )
