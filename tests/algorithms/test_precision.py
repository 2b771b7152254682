"""bfloat16 beside float32: every method's loss and gradients are close, and what must stay float32 does.

Tolerances are some three times the largest difference of seeds 1 to 8 (``-k measure -s`` prints them), on weights drawn
such that every layer matters. Losses are compared beside 1, since JARVIS's cosine is about 0 at first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opsin.algorithms.base import VisionAlgorithm
from opsin.algorithms.jarvis import JARVIS
from opsin.algorithms.l2t import L2T
from opsin.algorithms.ross import heads

import zoo
from methods import Bench, LoudROSS, teacher

PIXELS: dict[str, Any] = {"target": {"name": "pixels", "cell": 4}, "min_visible": 1}
TEACHER: dict[str, Any] = {"target": teacher(), "ntp_probability": 0.0, "layer": 2}


class Plain(VisionAlgorithm):
    """No method: the model's own loss."""

    name = "lm"


def ross(**options: Any) -> LoudROSS:
    return LoudROSS(**{**PIXELS, **options})


METHODS: dict[str, Any] = {
    "lm": Plain,
    "l2t": lambda: L2T(template_source="none", lambda_instruction=0.3),
    **{f"ross-{o}-dit": lambda o=o: ross(objective=o, width=64) for o in ("epsilon", "sample", "v_prediction", "flow_matching")},
    "ross-epsilon-vit": lambda: ross(head="vit", width=64),
    **{f"ross-{o}-mlp": lambda o=o: ross(objective=o) for o in ("mse", "cosine", "smooth_l1")},
    **{f"jarvis-{o}-{t}": lambda o=o, t=t: JARVIS(**TEACHER, loss=o, text_loss=t)
       for o in ("cosine", "smooth_l1") for t in ("masked", "unmasked")},
}  # fmt: skip
LOSS = {"lm": 0.0015, "l2t": 0.0015, "ross": 0.003, "jarvis": 0.002}
"""Largest difference of the losses, by method, as a share of the loss or of 1, whichever is larger."""
COSINE = 0.999
"""Least cosine between the gradients of both precisions, over the base model and over the head."""


class Drill(Bench):
    """A method on a model whose weights are as large as those of a trained one; its loss and gradients in one step."""

    def __init__(self, method: Any, seed: int, autocast: bool):
        super().__init__(method, size=32, bidirectional=True, max_seq_len=3000)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.hf.parameters():
                if parameter.ndim > 1:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
        self.model.net.autocast_dtype = torch.bfloat16 if autocast else None

    def step(self, batch: dict[str, Any], size: int | None = None) -> tuple[float, dict[str, torch.Tensor]]:
        if "ross" in self.method.name or "jarvis" in self.method.name:
            return super().step(batch, size)
        self.model.zero_grad()
        self.state.batch = dict(batch)
        self._tell("after_dataloader")
        (part,) = self.parts(self.state.batch)
        loss = self.model.loss(self.model(part), part)["lm"]
        loss.backward()
        found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return float(loss), {n: g for n, g in found.items() if bool(g.any())}


def samples(seed: int) -> list[dict]:
    return [
        zoo.sample(100 * seed + i, images=(1, 0, 2)[i % 3], turns=1 + i % 2, size=(40, 34)) for i in range(6)
    ]


def one_step(name: str, seed: int, autocast: bool) -> tuple[float, dict[str, torch.Tensor]]:
    drill = Drill(METHODS[name](), seed, autocast)
    return drill.step(drill.batch(samples(seed)))


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], head: bool) -> float:
    chosen = [n for n in a if n.startswith("net.auxiliary") == head]
    if not chosen:
        return 1.0
    x, y = (torch.cat([g[n].double().flatten() for n in chosen]) for g in (a, b))
    return float(x @ y / (x.norm() * y.norm()))


def differences(name: str, seed: int) -> tuple[float, float]:
    """Of the losses (a share of the loss or of 1), and the least cosine of gradients."""
    (exact, a), (rounded, b) = (one_step(name, seed, autocast) for autocast in (False, True))
    assert a.keys() == b.keys() and len(a) > 10
    assert all(g.dtype == torch.float32 for g in b.values())
    apart = abs(rounded - exact) / max(abs(exact), 1.0)
    return apart, min(cosine(a, b, head) for head in (False, True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_bf16_is_close_to_fp32(name: str, seed: int) -> None:
    loss, gradient = differences(name, seed)
    assert 0 < loss < LOSS[name.partition("-")[0]]  # 0: there was no autocast
    assert gradient > COSINE


@pytest.mark.slow
def test_measure() -> None:
    for name in METHODS:
        found = [differences(name, seed) for seed in range(1, 9)]
        print(f"{name:24} loss {max(f[0] for f in found):.5f}  gradient {min(f[1] for f in found):.6f}")


# What stays float32 --------------------------------------------------------------------------------------------

ISLANDS = ("_log_softmax", "nll_loss", "smooth_l1", "norm", "mean", "sum", "sqrt", "rsqrt", "cos", "sin", "exp", "pow",
           "var", "div", "log", "cumprod", "sigmoid")  # fmt: skip
"""Reductions, divisions and transcendental functions, by what their aten names hold."""


class Seen(TorchDispatchMode):
    """Operators that ran, with the floating dtypes of what they were given: below autocast, so what was really computed."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        self.ops |= {(name, a.dtype) for a in given if isinstance(a, torch.Tensor) and a.is_floating_point()}
        return func(*args, **(kwargs or {}))

    def of(self, dtype: torch.dtype) -> set[str]:
        return {name for name, found in self.ops if found == dtype}


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("lm", "l2t")])
def test_a_methods_loss_reduces_and_compares_in_fp32_while_it_multiplies_in_bf16(name: str) -> None:
    """Schedule, noise, targets, norms and distances: everything of a method after the forward pass but its linear layers."""
    drill, seen = Drill(METHODS[name](), 1, autocast=True), Seen()
    (part,) = drill.parts(drill.batch(samples(1)))
    drill.state.batch, drill.state.loss = part, {}
    drill._tell("before_forward")
    drill.model(part)
    with seen:
        drill._tell("after_loss")
    assert drill.state.loss[drill.method.name].dtype == torch.float32
    rounded, exact = seen.of(torch.bfloat16), seen.of(torch.float32)
    assert rounded & {"mm", "addmm", "bmm"}, rounded  # autocast was on
    assert not [op for op in rounded if any(island in op for island in ISLANDS)], sorted(rounded)
    assert exact & {"mean", "sum"}


def test_the_cross_entropy_is_fp32_over_bf16_logits() -> None:
    drill, seen = Drill(Plain(), 1, autocast=True), Seen()
    (part,) = drill.parts(drill.batch(samples(1)))
    with seen:
        outputs = drill.model(part)
        loss = drill.model.loss(outputs, part)["lm"]
    assert outputs["nll"].dtype == loss.dtype == torch.float32
    assert "_log_softmax" in seen.of(torch.float32) and "_log_softmax" not in seen.of(torch.bfloat16)
    assert "mm" in seen.of(torch.bfloat16)


@pytest.mark.parametrize("name", ["ross-epsilon-dit", "ross-flow_matching-dit", "ross-epsilon-vit"])
def test_ross_hands_fp32_to_its_head_and_takes_fp32_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noisy tokens, wanted values, modulation and residual stream."""
    drill = Drill(METHODS[name](), 1, autocast=True)
    stream: list[torch.dtype] = []
    stock = heads.plain_norm

    def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
        out = stock(x, eps)
        stream.append(out.dtype)
        return out

    monkeypatch.setattr(heads, "plain_norm", norm)
    head, given = drill.model.net.auxiliary["ross"], []
    head.register_forward_hook(lambda module, args, out: given.append((args[2].dtype, out.dtype)))
    for block in head.blocks:
        block.register_forward_hook(lambda module, args, out: stream.append(out.dtype))
    loss, _ = drill.step(drill.batch(samples(1)))
    assert loss > 0 and given == [(torch.float32, torch.float32)]
    assert len(stream) > 3 and set(stream) == {torch.float32}


@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
def test_jarvis_compares_fp32_features_with_fp32_predictions(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opsin.algorithms.jarvis import functional

    compared: list[tuple[torch.dtype, torch.dtype]] = []
    stock = functional.compared
    monkeypatch.setattr(
        functional,
        "compared",
        lambda f, kind: (compared.append((f.dtype, stock(f, kind).dtype)), stock(f, kind))[1],
    )
    drill = Drill(METHODS[f"jarvis-{loss}-masked"](), 1, autocast=True)
    drill.step(drill.batch(samples(1)))
    assert compared == [(torch.float32, torch.float32)]
