"""Memory of a GPU: what lies there all the time, and the most that a step adds.

Under DDP every GPU has all weights, gradients and optimizer states, and DDP's buckets hold the gradients once more
(Composer leaves ``gradient_as_bucket_view`` off). FSDP2 keeps a share of each and gathers a layer when it is used, in
bfloat16 with ``amp_bf16``; the layer behind it is gathered meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ...algorithms.workload import Workload
from ...models.vlm import VisionLanguageModel
from .methods import network_of
from .rehearsal import Rehearsal, Shape

STATES = {"sgd": 0, "decoupled_sgdw": 1, "rmsprop": 1, "adagrad": 1}
"""Tensors that an optimizer keeps a weight; two where it is not said (Adam and its kin)."""
RESERVE = 1.0 * 2**30
"""Bytes for the driver's context, libraries' workspaces and NCCL's buffers: a guess, not a measurement."""
SLACK = 0.05
"""Share of the rest that the allocator loses to fragments: a guess, too."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        weights, gradients, optimizer: that stay; ``gradients`` at their most.
        buckets: DDP's copies of the gradients.
        teachers: frozen networks of methods, outside the model.
        gathered: FSDP2's whole layers.
        activations: the most that forward and backward add, with gradients that did not exist before.
        update: the most that the optimizer's update adds.
        total: the most at any moment.
    """

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    teachers: float
    gathered: float
    activations: float
    update: float
    total: float

    def needs(self) -> float:
        """Of a GPU's memory, with reserve and slack."""
        return self.total * (1 + SLACK) + RESERVE

    def as_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {**asdict(self), "needs": self.needs()}


@dataclass(frozen=True)
class Way:
    """A way to train: ``ddp`` or ``fsdp2`` over some GPUs, with or without checkpointing."""

    sharded: bool
    checkpointing: bool
    gpus: int
    autocast: bool
    accumulated: bool
    optimizer: Mapping[str, Any]
    on_cpu: bool = False


class MemoryModel:
    """What a stage needs of each GPU.

    Args:
        model: of the stage, after its methods' INIT.
        works: of its methods.
    """

    def __init__(self, model: VisionLanguageModel, works: Mapping[str, Workload]):
        self.model, self.works = model, works
        self._rehearsals: dict[bool, Rehearsal] = {}

    def __call__(self, shape: Shape, way: Way) -> Memory:
        """Of one GPU while it trains micro-batches of a shape in a way."""
        model, works = self.model, self.works
        auxiliary = {id(p) for p in model.net.auxiliary.parameters()}
        parameters = list(model.parameters())
        size = lambda ps: float(sum(p.numel() * p.element_size() for p in ps))  # noqa: E731
        trained = [p for p in parameters if p.requires_grad]
        share = 1.0 / way.gpus if way.sharded else 1.0
        weights, gradients = size(parameters) * share, size(trained) * share
        name = str(way.optimizer.get("name", "adamw"))
        states = STATES.get(name, 2)
        if name == "sgd" and way.optimizer.get("momentum"):
            states = 1
        kept = states * gradients
        teachers = [network_of(w.target) for w in works.values() if w.target is not None]
        frozen = size([p for m in teachers if m is not None for p in m.parameters()])
        several = way.gpus > 1
        buckets = gradients if several and not way.sharded else 0.0
        gathered = _gathered(model, auxiliary, way.autocast) if way.sharded and several else 0.0
        low, there = way.sharded and several and way.autocast, way.accumulated or (way.sharded and several)
        if low not in self._rehearsals:
            self._rehearsals[low] = Rehearsal(model, works, low)
        step = self._rehearsals[low].peak(
            shape, checkpointing=way.checkpointing, autocast=way.autocast, gradients_there=there
        )
        update = _update(trained, way, share)
        during = step + (gradients if there else 0.0)
        stays = weights + kept + buckets + frozen
        total = stays + max(during + gathered, gradients + update)
        return Memory(weights, gradients, kept, buckets, frozen, gathered, step, update, total)


def _gathered(model: VisionLanguageModel, auxiliary: set[int], autocast: bool) -> float:
    """Whole parameters and gradients of what FSDP2 has gathered at its most: two layers, or what is no layer."""
    layers: list[nn.Module] = list(model.anatomy.decoder_layers(model.hf))
    within = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside and id(p) not in auxiliary]
    width = 2 if autocast else 4
    # A layer in use and the next one; of one of them the gradient, once as it is made and once (float32) to be reduced.
    of_layers = max(within, default=0) * (2 * width + width + 4)
    trained = sum(p.numel() for p in rest if p.requires_grad)
    of_rest = sum(p.numel() for p in rest) * width + trained * (width + 4)
    return float(of_rest + of_layers)


def _update(trained: list[nn.Parameter], way: Way, share: float) -> float:
    """What the optimizer's update makes: torch's default for a GPU goes over all weights at once."""
    name = str(way.optimizer.get("name", "adamw"))
    if way.optimizer.get("fused") or not trained:
        return 0.0
    whole = share * sum(p.numel() * p.element_size() for p in trained)
    largest = share * max(p.numel() * p.element_size() for p in trained)
    at_once = way.optimizer.get("foreach", not way.on_cpu) and name in ("adamw", "adam", "sgd")
    return float(whole if at_once else 2 * largest)
