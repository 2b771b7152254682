"""The loop that trains what ships and what studies are made of: towers, language models, auto-encoders on generated scenes.

Not for VLMs; those are trained by ``opsin train``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

_WARM_UP = 50  # steps
_FLOOR = 0.02  # of the peak learning rate, at the end
_SHOWN = 50  # steps over which a loss that is told is the mean


def fit(
    groups: Sequence[dict[str, Any]], loss_at: Callable[[int], Tensor], steps: int, console: Console,
    betas: tuple[float, float] = (0.9, 0.98),
) -> float:  # fmt: skip
    """AdamW, gradients clipped to norm 1, warm-up of 50 steps, then a cosine down to 2 % of each group's ``lr``.

    Args:
        groups: of ``torch.optim.AdamW``, each with ``params`` (a list), ``lr`` and ``weight_decay``.
        loss_at: number of a step, from 0 -> its loss, a scalar with a graph. It is called in order.
        steps: optimizer steps.
        console: a line every hundred steps.
        betas: of AdamW.

    Returns:
        Mean loss of the last 50 steps.
    """
    optimizer = torch.optim.AdamW(list(groups), betas=betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            min(1.0, (i + 1) / _WARM_UP) * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * i / steps)))
        ),
    )
    parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
    losses: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            passed = time.monotonic() - started
            console.print(f"step {step + 1}/{steps}  loss {_recent(losses):.4f}  {passed:.0f} s")
    return _recent(losses)


def group(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> dict[str, Any]:
    """One entry of ``groups``."""
    return {"params": list(parameters), "lr": lr, "weight_decay": weight_decay}


def _recent(losses: list[float]) -> float:
    last = losses[-_SHOWN:]
    return sum(last) / max(len(last), 1)
