"""Whose gradient a step is made of: each loss term's part in what moves the base model."""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config as functorch_config
from composer.utils import dist

from ..algorithms.base import unwrap
from ..models.parts import named_parts


def differentiate_compiled_layers_twice() -> None:
    """Let layers that are compiled from now on keep what their backward pass needs for another one.

    torch's AOTAutograd gives such buffers away in the first pass ("donated buffers") and refuses ``retain_graph``. It
    costs memory and changes no number.
    """
    if hasattr(functorch_config, "donated_buffer"):  # torch 2.6 and later
        functorch_config.donated_buffer = False


class GradientShares:
    """Gradients of one step by loss key, over the base model's trained parameters (no method's head).

    Gradients are summed over micro-batches and averaged over ranks before anything is measured, as those of the
    step are. For each key and each part (``vision_tower``, ``mm_projector``, ``language_model``), and over all of them:

    * ``KEY/gradient_norm[/PART]``: the norm of its gradient.
    * ``KEY/gradient_share[/PART]``: that norm over the sum of all keys' norms.
    * ``KEY/gradient_along[/PART]``: <its gradient, the step's> / |the step's|^2. These sum to 1; a negative one pulls
      against the step.

    Nothing is left in ``.grad``, no hook of a data-parallel wrapper runs and no random number is drawn.

    Args:
        model: of the state, wrapped or not; not sharded.
    """

    def __init__(self, model: Any):
        trained = [(part, p) for part, _, p in named_parts(unwrap(model)) if p.requires_grad]
        self.parts = [part for part, _ in trained if part != "auxiliary"]
        self.parameters = [p for part, p in trained if part != "auxiliary"]
        self.sums: dict[str, list[torch.Tensor]] = {}

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch's gradients; its graph stays for the step's own backward pass.

        Args:
            losses: key -> scalar, as the step sums them.
        """
        for key, loss in losses.items():
            if key not in self.sums:
                self.sums[key] = [torch.zeros_like(p) for p in self.parameters]
            if not self.parameters or not loss.requires_grad:
                continue
            found = torch.autograd.grad(loss.mean(), self.parameters, retain_graph=True, allow_unused=True)
            pairs = [(s, g) for s, g in zip(self.sums[key], found, strict=True) if g is not None]
            if pairs:
                torch._foreach_add_([s for s, _ in pairs], [g for _, g in pairs])  # pyright: ignore[reportPrivateImportUsage]

    def entries(self, micro_batches: int) -> dict[str, torch.Tensor]:
        """What is said in the class, as tensors on the device; every rank must call it.

        Args:
            micro_batches: of the step, each of which weighs the same.
        """
        scale = 1 / (micro_batches * dist.get_world_size())
        keys = list(self.sums)
        for each in self.sums.values():
            for grad in each:
                dist.all_reduce(grad)
            if each:
                torch._foreach_mul_(each, scale)  # pyright: ignore[reportPrivateImportUsage]
        out: dict[str, torch.Tensor] = {}
        names = sorted(set(self.parts))
        products = torch.stack([self._products(part, keys) for part in names]) if names else None
        if products is None:
            return out
        for suffix, product in [
            ("", products.sum(0)),
            *((f"/{n}", m) for n, m in zip(names, products, strict=True)),
        ]:
            norms, along = product.diagonal().clamp(min=0).sqrt(), product.sum(1)
            for i, key in enumerate(keys):
                out[f"{key}/gradient_norm{suffix}"] = norms[i]
                out[f"{key}/gradient_share{suffix}"] = norms[i] / norms.sum()
                out[f"{key}/gradient_along{suffix}"] = along[i] / product.sum()
        return out

    def _products(self, part: str, keys: list[str]) -> torch.Tensor:
        """Scalar products of all keys' gradients within a part, (K, K) float64."""
        rows = []
        for a in keys:
            row = []
            for b in keys:
                each = [
                    (x.float() * y.float()).sum(dtype=torch.float64)
                    for p, x, y in zip(self.parts, self.sums[a], self.sums[b], strict=True)
                    if p == part
                ]
                row.append(torch.stack(each).sum())
            rows.append(torch.stack(row))
        return torch.stack(rows)
