"""Compiled layers on the device: the numbers of uncompiled ones, no break inside a layer, taps and adapters included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from on_device import trained, worst

pytestmark = pytest.mark.gpu

ALL = ("ross", "l2t", "jarvis", "vift")
LORA = {"r": 4, "init_lora_weights": False}


def _trained(device: str, precision: str, **prepared: Any) -> dict[str, Any]:
    return trained.__wrapped__(ALL, device, precision, steps=3, prepared=prepared)  # type: ignore[attr-defined]


@pytest.mark.parametrize("prepared", [{}, {"lora": LORA, "checkpointing": True}], ids=["whole", "lora"])
def test_compiled_numbers_are_the_same_in_fp32(cuda: str, prepared: dict[str, Any]) -> None:
    torch._dynamo.reset()
    plain = _trained(cuda, "fp32", **prepared)
    compiled = _trained(cuda, "fp32", **prepared, compiled={"fullgraph": True})
    for a, b in zip(plain["losses"], compiled["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    assert worst(compiled["gradients"][0], plain["gradients"][0]) < 1e-4


def test_compiled_numbers_are_close_in_bf16(cuda: str) -> None:
    """As close as bf16 itself: fused operations round less often."""
    torch._dynamo.reset()
    plain = _trained(cuda, "amp_bf16")
    compiled = _trained(cuda, "amp_bf16", compiled={"fullgraph": True})
    for key, value in plain["losses"][0].items():
        assert compiled["losses"][0][key] == pytest.approx(value, rel=0.02, abs=0.02), key
    a, b = (
        torch.cat([v.flatten().float() for _, v in sorted(r["gradients"][0].items())])
        for r in (compiled, plain)
    )
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.98


def test_tuned_kernels_give_the_same_numbers(cuda: str) -> None:
    torch._dynamo.reset()
    plain = _trained(cuda, "fp32")
    compiled = _trained(cuda, "fp32", compiled={"mode": "max-autotune-no-cudagraphs"})
    for a, b in zip(plain["losses"], compiled["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
