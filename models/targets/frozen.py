"""Targets whose function is a frozen network, and how their keywords are checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UserError, nearest
from ..teachers import Teacher
from .base import Target

WHERE = "target"
"""How messages about a target begin; :func:`opsin.models.targets.build` puts the caller's place before it."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FrozenTarget(Target):
    """A target made by a frozen network. What it gives is float32 and lies on the network's device."""

    pictures_at_once = 8  # of an auto-encoder at 432 pixels: activations of a few GB

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32):
        # (not diffusers' own `to`, which warns of modules that there are none of)
        self.teacher = Teacher(nn.Module.to(module, dtype))
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.teacher.module.parameters()).device

    def to(self, device: torch.device) -> Target:
        """Move to a device, in place."""
        self.teacher.to(device)
        return self

    def _ready(self, values: torch.Tensor) -> torch.Tensor:
        """On the network's device, in its dtype."""
        return values.to(self.device, self.dtype)


def choice(key: str, value: Any, known: Any) -> Any:
    """``value`` if it is one of ``known``.

    Raises:
        UserError: it is not.
    """
    if value not in known:
        raise UserError(f"{WHERE}.{key}: unknown '{value}'{nearest(str(value), known)}")
    return value


def whole(key: str, value: Any) -> int:
    """``value`` if it is a whole number above 0.

    Raises:
        UserError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{WHERE}.{key}: a whole number of at least 1, got {value!r}")
    return value


def one_line(error: BaseException) -> str:
    """First line of an error; libraries put paragraphs into theirs."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
