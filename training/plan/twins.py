"""Copies of modules whose tensors hold no data: to count operations and memory without doing the work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...models.vlm import VisionLanguageModel


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


@contextmanager
def few_layers(model: VisionLanguageModel, count: int) -> Iterator[None]:
    """The decoder has its first layers alone, so that a copy of the model is quickly made."""
    parent, _, name = model.anatomy.layers.rpartition(".")
    owner = model.anatomy.decoder(model.hf).get_submodule(parent)
    layers = model.anatomy.decoder_layers(model.hf)
    setattr(owner, name, nn.ModuleList(layers[:count]))
    try:
        yield
    finally:
        setattr(owner, name, layers)
