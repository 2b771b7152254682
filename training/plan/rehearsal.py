"""A micro-batch's step on tensors without data: how many bytes are alive at once.

The model's own modules run, forward and backward, on PyTorch's fake tensors, which have shapes and no contents; every
storage that an operation makes is counted until it is freed. So checkpointing, autocast and a method's head are what
they are in a run. A few decoder layers are run and the rest are extrapolated, since every layer adds the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
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
from .twins import twin

FEW = (2, 3)
"""Decoder layers that are run; the difference is one layer's share."""


class Tracker(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live.

    Attributes:
        live, peak: bytes now, and at most.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        for tensor in known:
            self._note(tensor, counted=False)

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
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Shape:
    """A micro-batch.

    Attributes:
        rows, length: samples, and tokens of each row.
        labelled: tokens that are predicted, of all rows.
        pictures: of all rows, all alike: ``picture`` (3, H, W) with ``visual`` tokens, of which ``grid`` are patches.
    """

    rows: int
    length: int
    labelled: int
    pictures: int
    picture: tuple[int, ...]
    visual: int
    grid: Grid


def peak_of_step(
    model: VisionLanguageModel,
    works: Mapping[str, Workload],
    shape: Shape,
    *,
    checkpointing: bool,
    autocast: bool,
    low_precision_weights: bool = False,
    gradients_there: bool = False,
) -> float:
    """Most bytes alive during forward and backward of a micro-batch, beyond weights and what an optimizer keeps.

    Args:
        model: on any device; nothing of it is changed.
        works: of its methods; a target in it is computed in the step.
        shape: of the micro-batch.
        checkpointing: decoder layers are recomputed in the backward pass.
        autocast: to bfloat16.
        low_precision_weights: weights are bfloat16 where they are used, as FSDP2 gathers them.
        gradients_there: gradients exist already and are none of what is counted (a later micro-batch of a step); else
            those that the pass makes are counted.
    """
    layers = len(model.anatomy.decoder_layers(model.hf))
    options = {
        "checkpointing": checkpointing,
        "autocast": autocast,
        "low_precision_weights": low_precision_weights,
        "gradients_there": gradients_there,
    }
    if layers <= FEW[1]:
        return _peak(model, works, shape, layers, **options)
    few, more = (_peak(model, works, shape, count, **options) for count in FEW)
    return few + (layers - FEW[0]) * (more - few)


def _peak(
    model: VisionLanguageModel,
    works: Mapping[str, Workload],
    shape: Shape,
    layers: int,
    *,
    checkpointing: bool,
    autocast: bool,
    low_precision_weights: bool,
    gradients_there: bool,
) -> float:
    losses = {name: work.loss([shape.grid] * shape.pictures) for name, work in works.items() if work.loss}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        low = low_precision_weights and tensor.is_floating_point() and isinstance(tensor, nn.Parameter)
        return torch.empty(tensor.shape, dtype=torch.bfloat16 if low else tensor.dtype, device="cpu")

    with mode:
        net: Any = twin(model.net, fake)
        heads = {
            n: work.make_head() for n, work in works.items() if work.make_head is not None and n in losses
        }
        if low_precision_weights:
            heads = {name: head.to(torch.bfloat16) for name, head in heads.items()}
        networks = {n: network_of(work.target) for n, work in works.items() if work.target is not None}
        teachers = {n: twin(m, fake) for n, m in networks.items() if m is not None}
    decoder: Any = net.anatomy.decoder(net.hf)
    parent, _, name = net.anatomy.layers.rpartition(".")
    setattr(decoder.get_submodule(parent), name, nn.ModuleList(net.anatomy.decoder_layers(net.hf)[:layers]))
    net.train()
    if checkpointing:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        decoder.gradient_checkpointing_disable()
    modules = [net, *heads.values(), *teachers.values()]
    known = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    if gradients_there:
        for parameter in (p for p in known if isinstance(p, nn.Parameter) and p.requires_grad):
            with mode:
                parameter.grad = torch.empty_like(parameter)
            known = [*known, parameter.grad]
    with mode:
        inputs = _inputs(shape, next(net.hf.parameters()).dtype)
    known += list(inputs.values())
    with mode, Tracker(known) as tracker:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = _forward(net, inputs, shape)
            for method, make in losses.items():
                work = works[method]
                if method in teachers and work.target is not None:
                    _teach(teachers[method], work, shape, net)
                patches = loss.hidden.flatten(0, 1)[inputs["patches"]]
                if method in heads:
                    loss.total = loss.total + make(heads[method], patches)
        hidden_total, loss = loss.total, None
        hidden_total.backward()
    return float(tracker.peak)


@dataclass
class _Pass:
    total: torch.Tensor
    hidden: torch.Tensor


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


def _forward(net: Any, inputs: dict[str, torch.Tensor], shape: Shape) -> _Pass:
    """What ``VisionLanguageNet.forward`` and a LLaVA's body do, without looking at values."""
    hf, anatomy = net.hf, net.anatomy
    features = anatomy.image_features(hf, {PIXEL_KEY: inputs["pixels"]})
    embeddings = hf.get_input_embeddings()(inputs["input_ids"])
    place = torch.ones(shape.rows, shape.length, 1, dtype=torch.bool).expand_as(embeddings)
    embeddings = embeddings.masked_scatter(place, features.to(embeddings.dtype))
    mask = torch.ones(shape.rows, 1, shape.length, shape.length, dtype=torch.bool)
    out = anatomy.decoder(hf)(
        inputs_embeds=embeddings,
        attention_mask=mask,
        position_ids=inputs["positions"],
        use_cache=False,
        return_dict=True,
    )
    hidden = out.last_hidden_state
    logits = anatomy.head(hf, hidden.flatten(0, 1)[inputs["labels"]]).float()
    return _Pass(F.cross_entropy(logits, inputs["targets"], reduction="none").sum(), hidden)


def _teach(teacher: nn.Module, work: Workload, shape: Shape, net: Any) -> None:
    """A target's network on the pictures of a micro-batch, as many at once as it takes."""
    assert work.target is not None
    vision = getattr(net.hf.config, "vision_config", None)
    patch = int(getattr(vision, "patch_size", 14))
    count = max(1, min(shape.pictures, work.target.pictures_at_once))
    dtype = next(teacher.parameters()).dtype
    pixels = torch.empty(count, 3, *picture_of(work.target, shape.grid, patch), dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        run_network(teacher, pixels)
