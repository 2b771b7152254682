"""Floating-point operations of a step, by part: two for a multiplication and an addition, as PyTorch counts them.

Attention counts every pair of tokens of a row, also those that a causal mask hides (the convention of published MFUs).
Recomputation by activation checkpointing is no work of the model and is told apart. Counted from the modules, in
microseconds for any batch, so that a run can log it; tests hold it against PyTorch's own counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...models.geometry import PIXEL_KEY
from ...models.vlm import VisionLanguageModel
from .load import Load, load_of_batch
from .methods import MethodOperations, workloads
from .twins import few_layers, on_meta, twin


def linears(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """All linear layers inside some modules."""
    return [m for module in modules for m in module.modules() if isinstance(m, nn.Linear)]


class ModelOperations:
    """Operations a token of the parts of a model, forward and backward, from its linear layers; also of a sharded one."""

    def __init__(self, model: VisionLanguageModel):
        anatomy, hf = model.anatomy, model.hf
        text = hf.config.get_text_config()
        layers: Any = anatomy.decoder_layers(hf)
        self.layers = len(layers)
        self.width = int(text.hidden_size)
        heads = int(text.num_attention_heads)
        self.attention = 4.0 * heads * int(getattr(text, "head_dim", None) or self.width // heads)
        self.layer_forward, self.layer_backward = _pairs(linears(layers))
        self.head_forward, self.head_backward = _pairs([hf.get_submodule(anatomy.lm_head)])
        self.tower_trained = any(p.requires_grad for p in model.parameters_of(["vision_tower"]))
        before = self.tower_trained or any(p.requires_grad for p in model.parameters_of(["mm_projector"]))
        decoder = any(p.requires_grad for p in anatomy.decoder(hf).parameters())  # its embeddings are in it
        self.differentiated = before or decoder
        modules = dict(hf.named_modules())
        projector = linears(modules[path] for path in anatomy.projector if path in modules)
        self.projector_forward, self.projector_backward = _pairs(projector)
        if projector and not self.tower_trained:  # nothing before its first layer wants a gradient
            self.projector_backward -= 2.0 * projector[0].in_features * projector[0].out_features
        vision = getattr(hf.config, "vision_config", None)
        self.merge = int(getattr(vision, "spatial_merge_size", 1) or 1) ** 2
        self.patch = int(getattr(vision, "patch_size", 14) or 14)
        inside = {id(m) for m in projector}
        tower = linears(modules[path] for path in anatomy.vision_tower if path in modules)
        self.tower_linear = sum(2.0 * m.in_features * m.out_features for m in tower if id(m) not in inside)
        depth = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 0) or 0
        across = getattr(vision, "embed_dim", None) or getattr(vision, "hidden_size", 0) or 0
        self.tower_attention = 4.0 * float(depth) * float(across)


class StepOperations:
    """Operations of a model and its methods for any :class:`Load`.

    Made while parameters are whole (at INIT, before sharding).

    Args:
        model: on any device.
        algorithms: of the run, by name; their work is asked for when it is first needed, after INIT.
        stored: targets come with the data; None: as the methods decided when training started.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        algorithms: Mapping[str, Any] | None = None,
        stored: bool | None = None,
    ):
        self._stored = stored
        self._model, self._algorithms = model, algorithms or {}
        self._vision: Any = None
        if model.anatomy.family == "llava":
            with few_layers(model, 1):
                self._vision = twin(model.net, on_meta)
        self._pictures: dict[tuple[int, ...], float] = {}
        self._methods: dict[str, MethodOperations] | None = None

    @cached_property
    def model(self) -> ModelOperations:
        """What the model's modules cost; what is frozen when this is first asked for counts as frozen."""
        return ModelOperations(self._model)

    @property
    def methods(self) -> dict[str, MethodOperations]:
        """Methods with work of their own."""
        if self._methods is None:
            found = workloads(self._algorithms, self._model)
            self._methods = {
                n: MethodOperations(w, self.model.width, self.model.patch) for n, w in found.items()
            }
        return self._methods

    def picture(self, shape: tuple[int, ...]) -> float:
        """Of the tower for one picture, forward."""
        if shape not in self._pictures:
            if self._vision is not None and len(shape) == 3:
                anatomy = self._model.anatomy
                pixels = torch.empty(1, *shape, device="meta", dtype=next(self._vision.parameters()).dtype)
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    tokens = anatomy.image_features(self._vision.hf, {PIXEL_KEY: pixels}).shape[0]  # type: ignore[arg-type]
                counted = float(counter.get_total_flops()) - tokens * self.model.projector_forward
            else:  # its own linear layers and attention over the whole picture
                patches = shape[0] if len(shape) == 1 else shape[1] * shape[2] // self.model.patch**2
                counted = patches * self.model.tower_linear + self.model.tower_attention * float(patches) ** 2
            self._pictures[shape] = counted
        return self._pictures[shape]

    def by_part(self, load: Load) -> dict[str, float]:
        """Operations of a step on ``load``, forward and backward: part or ``method/what`` -> operations."""
        m = self.model
        tower = sum(self.picture(shape) * count for shape, count in load.pictures.items())
        decoder = load.tokens * m.layer_forward + load.pairs * m.attention * m.layers
        if m.differentiated:
            decoder += load.tokens * m.layer_backward + 2 * load.pairs * m.attention * m.layers
        head = m.head_forward + (m.head_backward if m.differentiated else 0.0)
        found = {
            "vision_tower": tower * (3.0 if m.tower_trained else 1.0),
            "mm_projector": load.visual * (m.projector_forward + m.projector_backward),
            "language_model": decoder,
            "lm_head": load.labelled * head,
        }
        for name, method in self.methods.items():
            work = method.work
            own = sum(method.head(grid) * count for grid, count in load.grids.items())
            target = sum(method.target(grid) * count for grid, count in load.grids.items())
            found[f"{name}/head"] = own * work.share
            if target and not self._takes_stored(name):
                found[f"{name}/target"] = target * work.share
            if work.layers:
                each = (m.layer_forward + m.layer_backward) / m.layers
                again = 0.0
                for (rows, columns), count in load.grids.items():
                    tokens = work.tokens * rows * columns
                    again += count * work.layers * (tokens * each + 3 * m.attention * tokens**2)
                found[f"{name}/second pass"] = again * work.share
        return found

    def _takes_stored(self, name: str) -> bool:
        if self._stored is not None:
            return self._stored
        return bool(getattr(self._algorithms[name], "takes_stored", False))

    def recomputed(self, load: Load) -> float:
        """Of the decoder's layers once more, with activation checkpointing."""
        m = self.model
        return load.tokens * m.layer_forward + load.pairs * m.attention * m.layers

    def __call__(self, batch: Mapping[str, Any]) -> float:
        """Operations of the step on a device batch, for Composer's SpeedMonitor."""
        return sum(self.by_part(load_of_batch(batch, self.model.merge)).values())


def _pairs(modules: list[Any]) -> tuple[float, float]:
    """Operations a token, forward and backward (into the input always; into the weights where they are trained)."""
    forward = backward = 0.0
    for module in modules:
        work = 2.0 * module.in_features * module.out_features
        forward += work
        backward += work * (2.0 if module.weight.requires_grad else 1.0)
    return forward, backward
