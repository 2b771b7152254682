"""A head that has nothing to do runs all the same, and learns nothing, whatever stands where it reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.jarvis.heads import JarvisHead
from opsin.algorithms.ross import ROSS
from opsin.algorithms.ross.heads import make_head
from opsin.models.net import nan_safe_zero

WIDTH, DIM = 16, 12


def jarvis(states: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    method, head = JARVIS(target="tower", masks="none"), JarvisHead("mlp", WIDTH, DIM, 0.02, latent=False)
    method.tap = 1
    model: Any = SimpleNamespace(
        step=lambda batch: SimpleNamespace(tapped={1: states}),
        net=SimpleNamespace(auxiliary={"jarvis": head}),
    )
    batch = {"jarvis/views": [], "jarvis/targets": torch.zeros(0, dtype=torch.int64)}
    batch["patch_position"] = batch["jarvis/targets"]
    return head, nan_safe_zero(method.predictions(model, batch))


def ross(states: torch.Tensor) -> tuple[torch.nn.Module, torch.Tensor]:
    method: Any = ROSS(target={"name": "pixels", "cell": 2})
    head = make_head(method.head, WIDTH, DIM, depth=1, width=32, mlp_ratio=2.0, position_grid=(4, 4))
    method.set_target(SimpleNamespace(dim=DIM))
    return head, method._idle(head, states)


@pytest.mark.parametrize("run", [jarvis, ross])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_an_idle_head_gives_zeros_to_every_weight(run: Any, value: float) -> None:
    states = torch.full((1, 3, WIDTH), value, requires_grad=True)
    head, loss = run(states)
    loss.backward()
    assert loss.item() == 0 and torch.equal(states.grad, torch.zeros_like(states))
    read = [p.grad for p in head.parameters()]
    assert all(grad is not None and not grad.any() for grad in read) and read
