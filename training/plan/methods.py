"""The work of a stage's methods, asked of each of them (:mod:`opsin.algorithms.workload`)."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...algorithms.base import VisionAlgorithm
from ...algorithms.workload import Workload
from ...models.targets import Target
from ...models.vlm import VisionLanguageModel
from .load import Grid
from .twins import on_meta, twin


def workloads(algorithms: Mapping[str, Any], model: VisionLanguageModel) -> dict[str, Workload]:
    """Name -> work of every method that is on and has some; after INIT."""
    found = {}
    for name, algorithm in algorithms.items():
        if not isinstance(algorithm, VisionAlgorithm) or algorithm.is_off():
            continue
        own = getattr(algorithm, "workload", None)
        if callable(own):
            found[name] = own(model)
            continue
        module = f"{type(algorithm).__module__.rpartition('.')[0]}.workload"
        if importlib.util.find_spec(module) is not None and module != "opsin.algorithms.workload":
            found[name] = importlib.import_module(module).workload(algorithm, model)
    return found


class MethodOperations:
    """Operations of one method, view by view; each grid is counted once, on the meta device."""

    def __init__(self, work: Workload, width: int, patch: int):
        self.work, self.width, self.patch = work, width, patch
        self._head: nn.Module | None = None
        self._heads: dict[Grid, float] = {}
        self._targets: dict[Grid, float] = {}

    def head(self, grid: Grid) -> float:
        """Of its head for one view, forward and backward."""
        if self.work.make_head is None or self.work.loss is None:
            return 0.0
        if grid not in self._heads:
            loss = self.work.loss([grid])
            with torch.device("meta"):
                if self._head is None:
                    self._head = self.work.make_head()
                hidden = torch.empty(grid[0] * grid[1], self.width, requires_grad=True)
                with FlopCounterMode(display=False) as counter:
                    loss(self._head, hidden).backward()
            self._heads[grid] = float(counter.get_total_flops())
        return self._heads[grid]

    def target(self, grid: Grid) -> float:
        """Of its target for one picture."""
        if self.work.target is None:
            return 0.0
        if grid not in self._targets:
            self._targets[grid] = target_operations(self.work.target, grid, self.patch)
        return self._targets[grid]


def network_of(target: Target) -> nn.Module | None:
    """The frozen network behind a target; None: it has none (pixels)."""
    teacher = getattr(getattr(target, "teacher", None), "module", None)
    network = getattr(target, "module", None) or teacher
    return network if isinstance(network, nn.Module) else None


def picture_of(target: Target, grid: Grid, patch: int) -> tuple[int, int]:
    """Height and width in pixels of the picture that a target reads for a view of ``patch`` pixels a patch."""
    if getattr(target, "fixed", False):  # the network takes pictures of its own size only
        return target.reader.own  # type: ignore[attr-defined]
    side = getattr(target, "image_size", None)
    if side:
        return int(side), int(side)
    cell = patch if getattr(target, "resize", "pixels") == "features" else target.cell
    return grid[0] * cell, grid[1] * cell


def run_network(network: nn.Module, pixels: torch.Tensor) -> Any:
    """A target's network on normalised pixels (B, 3, H, W): an auto-encoder encodes, all others are called."""
    encode = getattr(network, "encode", None)
    if callable(encode):
        return encode(pixels)
    any_size = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
    return network(pixels, interpolate_pos_encoding=True) if any_size else network(pixels)


def target_operations(target: Target, grid: Grid, patch: int) -> float:
    """Operations of a target for one picture, without gradients: counted on the meta device."""
    network = network_of(target)
    if network is None:
        return 0.0
    copied = twin(network, on_meta).eval()
    dtype = next(copied.parameters()).dtype
    pixels = torch.empty(1, 3, *picture_of(target, grid, patch), device="meta", dtype=dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_network(copied, pixels)
    return float(counter.get_total_flops())
