"""Frozen models that methods ask for targets: never trained, never sharded, never saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Teacher:
    """Holds a frozen module outside the module tree, so that no optimizer, wrapper or checkpoint meets it.

    Args:
        module: put into evaluation mode for good (some towers draw random numbers in training mode) and
            stripped of gradients.
    """

    def __init__(self, module: nn.Module):
        self.module = module.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Teacher:
        """Move to a device, in place."""
        self.module.to(device)
        return self

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, without a graph."""
        return self.module(*args, **kwargs)
