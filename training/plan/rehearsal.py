"""A micro-batch's step on tensors without data: how many bytes are alive at once.

The model's own modules run, forward and backward, on PyTorch's fake tensors, which have shapes and no contents; every
storage that an operation makes is counted until it is freed. So checkpointing, autocast and a method's head are what
they are in a run. A few decoder layers are run and the rest are extrapolated, since every layer adds the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ...algorithms.workload import Workload
from ...models.geometry import PIXEL_KEY
from ...models.vlm import VisionLanguageModel
from .load import Grid
from .methods import network_of, picture_of, run_network
from .twins import few_layers, twin

FEW = (2, 3)
"""Decoder layers that are run; the difference is one layer's share, of each phase of a step."""


class Tracker(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live.

    Attributes:
        live: bytes now.
        peaks: at most, by phase. Each grows by the same for every further layer, which their maximum need not: a deep
            model's is where its activations are most, a shallow one's where the embeddings' gradient is made.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live = 0
        self.phase = "forward"
        self.peaks: dict[str, float] = {self.phase: 0.0}
        self._known: dict[int, Any] = {}
        for tensor in known:
            self._note(tensor, counted=False)

    def enter(self, phase: str) -> None:
        """Another phase of the step begins."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), float(self.live))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._note(value)
        return out

    def _note(self, tensor: torch.Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0

        def gone(_: Any, key: int = key, size: int = size) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peaks[self.phase] = max(self.peaks[self.phase], float(self.live))


@dataclass(frozen=True)
class Shape:
    """A micro-batch.

    Attributes:
        rows, length: samples, and tokens of each row.
        labelled: tokens that are predicted, of all rows.
        pictures: of all rows, all alike: ``picture`` (3, H, W) with ``visual`` tokens, of which ``grid`` are patches.
        masked: attention takes a mask, as it does where rows are padded or packed, or images bidirectional; every layer
            makes a copy of it in the precision of its queries.
    """

    rows: int
    length: int
    labelled: int
    pictures: int
    picture: tuple[int, ...]
    visual: int
    grid: Grid
    masked: bool = True


class Rehearsal:
    """A model's step on tensors without data.

    Args:
        model: on any device; nothing of it is changed.
        works: of its methods; a target in it is computed in the step.
        low_precision_weights: weights are bfloat16 where they are used, as FSDP2 gathers them.
    """

    def __init__(
        self, model: VisionLanguageModel, works: Mapping[str, Workload], low_precision_weights: bool = False
    ):
        self.works = works
        self.layers = len(model.anatomy.decoder_layers(model.hf))
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            low = low_precision_weights and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            return torch.empty(tensor.shape, dtype=torch.bfloat16 if low else tensor.dtype, device="cpu")

        networks = {n: network_of(work.target) for n, work in works.items() if work.target is not None}
        with self.mode, few_layers(model, FEW[1]):
            self.net: Any = twin(model.net, fake)
            made = {
                n: w.make_head() for n, w in works.items() if w.make_head is not None and w.loss is not None
            }
            self.heads = {
                n: head.to(torch.bfloat16) if low_precision_weights else head for n, head in made.items()
            }
            self.teachers = {n: twin(m, fake).eval() for n, m in networks.items() if m is not None}
        self.net.train()
        self.tower: Any = self.net.hf.get_submodule(model.anatomy.vision_tower[0])
        self._towers: dict[Any, tuple[Any, float]] = {}

    def peak(
        self, shape: Shape, *, checkpointing: bool, autocast: bool, gradients_there: bool = False
    ) -> float:
        """Most bytes alive during forward and backward of a micro-batch, beyond weights and what an optimizer keeps.

        Args:
            shape: of the micro-batch.
            checkpointing: decoder layers are recomputed in the backward pass.
            autocast: to bfloat16.
            gradients_there: gradients exist already and are none of what is counted (a later micro-batch of a step);
                else those that the pass makes are counted.
        """
        decoder: Any = self.net.anatomy.decoder(self.net.hf)
        if checkpointing:
            decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            decoder.gradient_checkpointing_disable()
        seen, tower = self._frozen_tower(shape, autocast)
        if seen is not None:
            self.tower.forward = lambda *args, **kwargs: seen
        try:
            if self.layers <= FEW[1]:
                return max(tower, *self._peaks(shape, self.layers, autocast, gradients_there).values())
            few, more = (self._peaks(shape, count, autocast, gradients_there) for count in FEW)
            # What lies between the first and the last layer's backward pass lies between theirs in size, too.
            return max(tower, *(few[p] + (self.layers - FEW[0]) * (more[p] - few[p]) for p in few))
        finally:
            if seen is not None:
                del self.tower.forward

    def _frozen_tower(self, shape: Shape, autocast: bool) -> tuple[Any, float]:
        """What a frozen tower makes of the pictures, and its own peak; it is the same for every way to train the rest."""
        if any(p.requires_grad for p in self.tower.parameters()):
            return None, 0.0
        key = (shape.pictures, shape.picture, autocast)
        if key not in self._towers:
            with self.mode:
                pixels = _inputs(shape, next(self.net.hf.parameters()).dtype)["pixels"]
            tracker = Tracker([*self.tower.parameters(), *self.tower.buffers(), pixels])
            with self.mode, tracker, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                made = self.tower(pixels, output_hidden_states=True)
            self._towers[key] = made, max(tracker.peaks.values())
        return self._towers[key]

    def _peaks(self, shape: Shape, layers: int, autocast: bool, gradients_there: bool) -> dict[str, float]:
        losses = {
            n: w.loss([shape.grid] * shape.pictures) for n, w in self.works.items() if w.loss is not None
        }
        parameters = [
            p for m in (self.net, *self.heads.values(), *self.teachers.values()) for p in m.parameters()
        ]
        buffers = [b for m in (self.net, *self.heads.values(), *self.teachers.values()) for b in m.buffers()]
        with self.mode:
            for parameter in parameters:
                there = gradients_there and parameter.requires_grad
                parameter.grad = torch.empty_like(parameter) if there else None
            inputs = _inputs(shape, next(self.net.hf.parameters()).dtype)
        gradients = [p.grad for p in parameters if p.grad is not None]
        tracker = Tracker([*parameters, *buffers, *gradients, *inputs.values()])
        chosen = self.net.anatomy.decoder_layers(self.net.hf)[:layers]
        hooks = [
            layer.register_forward_hook(partial(_mark, tracker, _phase(number, layers)))
            for number, layer in enumerate(chosen)
        ]
        if (
            not shape.masked
        ):  # transformers makes a mask for every fake tensor, as it cannot see that none is needed
            hooks += [layer.register_forward_pre_hook(_unmasked, with_kwargs=True) for layer in chosen]
        with few_layers(self.net, layers), self.mode, tracker:  # type: ignore[arg-type]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                total = self._forward(shape, inputs, losses)
            tracker.enter("head")
            total.backward()
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None
        return tracker.peaks

    def _forward(
        self, shape: Shape, inputs: dict[str, torch.Tensor], losses: Mapping[str, Any]
    ) -> torch.Tensor:
        """Loss of model and methods, as the trainer has them one after the other."""
        total, hidden = _model_loss(self.net, inputs, shape)
        for method, loss in losses.items():
            if method in self.teachers:
                self._teach(method, shape)
            if method in self.heads:
                total = total + loss(self.heads[method], hidden.flatten(0, 1)[inputs["patches"]])
        return total

    def _teach(self, method: str, shape: Shape) -> None:
        """A target's network on the pictures of a micro-batch, as many at once as it takes."""
        target, teacher = self.works[method].target, self.teachers[method]
        assert target is not None
        vision = getattr(self.net.hf.config, "vision_config", None)
        patch = int(getattr(vision, "patch_size", 14))
        count = max(1, min(shape.pictures, target.pictures_at_once))
        dtype = next(teacher.parameters()).dtype
        pixels = torch.empty(count, 3, *picture_of(target, shape.grid, patch), dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            run_network(teacher, pixels)


def _phase(number: int, layers: int) -> str:
    """Name of a layer's backward pass; what comes after the first layer's counts as its own."""
    return "first layer" if number == 0 else "last layer" if number == layers - 1 else "middle"


def _mark(tracker: Tracker, phase: str, layer: nn.Module, args: Any, output: Any) -> None:
    """Have a phase begin where the gradient of a layer's output is there."""
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(lambda _: tracker.enter(phase))


def _unmasked(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "attention_mask": None}


def _inputs(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    ids = {"input_ids": (shape.rows, shape.length), "positions": (shape.rows, shape.length)}
    flat = {
        "labels": shape.labelled,
        "targets": shape.labelled,
        "patches": shape.pictures * shape.grid[0] * shape.grid[1],
    }
    made = {key: torch.zeros(size, dtype=torch.int64) for key, size in ids.items()}
    made.update({key: torch.zeros(max(1, size), dtype=torch.int64) for key, size in flat.items()})
    made["pixels"] = torch.empty(max(1, shape.pictures), *shape.picture, dtype=dtype)
    return made


def _model_loss(net: Any, inputs: dict[str, torch.Tensor], shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``VisionLanguageNet.forward`` and a LLaVA's body do, without looking at values: loss, and last hidden states."""
    hf, anatomy = net.hf, net.anatomy
    features = anatomy.image_features(hf, {PIXEL_KEY: inputs["pixels"]})
    embeddings = hf.get_input_embeddings()(inputs["input_ids"])
    place = torch.ones(shape.rows, shape.length, 1, dtype=torch.bool).expand_as(embeddings)
    embeddings = embeddings.masked_scatter(place, features.to(embeddings.dtype))
    attention: dict[str, torch.Tensor] = {}
    if shape.masked:
        mask = torch.ones(shape.rows, 1, shape.length, shape.length, dtype=torch.bool)
        attention = {"attention_mask": mask, "position_ids": inputs["positions"]}
    decoder = anatomy.decoder(hf)
    out = decoder(inputs_embeds=embeddings, use_cache=False, return_dict=True, **attention)
    hidden = out.last_hidden_state
    logits = anatomy.head(hf, hidden.flatten(0, 1)[inputs["labels"]]).float()
    return F.cross_entropy(logits, inputs["targets"], reduction="none").sum(), hidden
