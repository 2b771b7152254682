"""How far two trainings are apart, as one number: relative to the largest value of the same kind."""

from __future__ import annotations

from typing import Any

import torch


def loss_difference(a: dict[str, Any], b: dict[str, Any], steps: slice = slice(None)) -> float:
    """Of the results of two ``jobs.train``: the largest difference of any loss term of a step, over the largest term there."""
    worst = 0.0
    pairs = list(zip(a["losses"][steps], b["losses"][steps], strict=True))
    assert pairs
    for x, y in pairs:
        assert list(x) == list(y)
        scale = max(map(abs, x.values())) or 1.0
        worst = max(worst, *(abs(x[key] - y[key]) / scale for key in x))
    return worst


def parts_of(gradients: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Names of parameters: those of the base model, and of each head."""
    parts: dict[str, list[str]] = {}
    for name in gradients:
        head = name.split(".")[2] if name.startswith("net.auxiliary.") else "base"
        parts.setdefault(head, []).append(name)
    return parts


def gradient_difference(a: dict[str, Any], b: dict[str, Any], steps: slice = slice(None)) -> float:
    """The largest difference of any entry of a step's gradient, over the largest entry of its part (base model, each head)."""
    worst = 0.0
    pairs = list(zip(a["gradients"][steps], b["gradients"][steps], strict=True))
    assert pairs
    for x, y in pairs:
        assert x.keys() == y.keys()
        for names in parts_of(x).values():
            scale = max(float(x[n].abs().max()) for n in names) or 1.0
            worst = max(worst, *(float((x[n] - y[n]).abs().max()) / scale for n in names))
    return worst


def same_bits(a: dict[str, Any], b: dict[str, Any], steps: slice = slice(None)) -> bool:
    """Whether losses and final weights of two trainings are equal to the bit."""
    return (
        a["losses"][steps] == b["losses"][steps]
        and a["weights"].keys() == b["weights"].keys()
        and all(torch.equal(v, b["weights"][k]) for k, v in a["weights"].items())
    )
