"""What a method adds to a step, told without data: for ``opsin plan`` and for the operations that SpeedMonitor logs.

A method tells it by a module ``workload`` beside its class with a function ``workload(algorithm, model)``, or by a method
of that name that takes the model. A method without either is counted as no work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models.targets import Target

Grids = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Workload:
    """A method's work in a step, for the views that it acts on.

    Attributes:
        make_head: builds its head on the current default device; None: it has none.
        loss: grids of the views -> a function of the head and of hidden states (P, D) at their patches that gives its
            loss, a scalar, as tensors without data can go through it.
        target: what it computes of each picture while training; None: nothing, or it is stored with the data.
        share: of all views, on which it acts.
        layers: decoder layers through which it sends tokens a second time.
        tokens: share of a view's tokens that go there.
    """

    make_head: Callable[[], nn.Module] | None = None
    loss: Callable[[Grids], Callable[[nn.Module, torch.Tensor], torch.Tensor]] | None = None
    target: Target | None = None
    share: float = 1.0
    layers: int = 0
    tokens: float = 0.0
