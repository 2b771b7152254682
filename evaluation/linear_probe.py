"""Linear read-out of a label from features: the one probe of all audits, with the marks that it has to beat.

Multinomial logistic regression, with one fixed and small penalty for all features: nothing is tuned on what is scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .scorers.base import Measure, share

_DECAY = 1e-3  # of the probe's weights, times half their squared norm, beside the mean loss

SHUFFLES = 4
"""Of labels. A single one may lie well off chance: a direction that fits nothing still sorts some classes."""


def standardised(x: torch.Tensor, fit: torch.Tensor) -> torch.Tensor:
    """Each feature of ``x`` (n, d) with mean 0 and deviation 1 over the rows ``fit`` (n,) bool; float32."""
    x = x.float()
    return (x - x[fit].mean(0)) / x[fit].std(0).clamp_min(1e-6)


def probe(
    x: torch.Tensor, y: torch.Tensor, held_out_x: torch.Tensor, held_out_y: torch.Tensor, classes: int
) -> float:
    """Accuracy of multinomial logistic regression (L2-regularised, fitted by L-BFGS to its end).

    Args:
        x: (n, d) float32, standardised.
        y: (n,) classes.
        held_out_x, held_out_y: what is scored; a class of -1 is never read rightly.
        classes: number of them.
    """
    return float(_right(x, y[None], held_out_x, held_out_y, classes).float().mean())


def _right(
    x: torch.Tensor, y: torch.Tensor, held_out_x: torch.Tensor, held_out_y: torch.Tensor, classes: int
) -> torch.Tensor:
    """(k, held out) bool: whether each of k probes, fitted on labels (k, n), is right. They share the search's steps."""
    weight = torch.zeros(len(y), x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(len(y), 1, classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=100, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = len(y) * F.cross_entropy((x @ weight + bias).flatten(0, 1), y.flatten())
        loss = loss + 0.5 * _DECAY * weight.square().sum()
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return (held_out_x @ weight + bias).argmax(-1) == held_out_y


@dataclass(frozen=True)
class Reading:
    """How well a label is read.

    Attributes:
        accuracy: on held-out rows, which are taken for independent.
        shuffled: of the same probe fitted on the same rows with their labels shuffled among them, mean of ``SHUFFLES``.
        majority: of the fitted rows' most frequent label.
        classes: labels among the fitted rows.
    """

    accuracy: Measure
    shuffled: float
    majority: float
    classes: int


def read(x: torch.Tensor, y: torch.Tensor, fit: torch.Tensor, classes: int, seed: int = 0) -> Reading:
    """Fit on some rows, score on the others.

    Args:
        x: (n, d), of any scale.
        y: (n,) int64 classes; -1 for one that the fitted rows do not have.
        fit: (n,) bool.
        classes: number of them.
        seed: of the shuffle; the global generator is left alone.
    """
    x, rest, label = standardised(x, fit), ~fit, y[fit]
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(label), generator=generator) for _ in range(SHUFFLES)])
    shuffled = _right(x[fit], label[orders.to(label.device)], x[rest], y[rest], classes)
    return Reading(
        accuracy=share(_right(x[fit], label[None], x[rest], y[rest], classes)[0].tolist()),
        shuffled=float(shuffled.float().mean()),
        majority=majority(label, y[rest]),
        classes=classes,
    )


def majority(y: torch.Tensor, held_out_y: torch.Tensor) -> float:
    """Accuracy of always saying the most frequent of ``y``."""
    return float((held_out_y == y.bincount().argmax()).float().mean())
