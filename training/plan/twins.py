"""Copies of modules whose tensors hold no data: to count operations and memory without doing the work."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


def twin(module: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A deep copy whose parameters and buffers are ``make(tensor)``; tied ones stay tied, no data is copied."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        fresh = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = fresh
    for buffer in module.buffers():
        memo[id(buffer)] = make(buffer)
    return copy.deepcopy(module, memo)


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the same shape and dtype on the meta device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
