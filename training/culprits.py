"""A second look at a batch whose loss was no number: which of its samples made it so."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from composer.core import Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from composer.utils import dist

from ..algorithms.base import VisionAlgorithm, unwrap
from ..data.batch import split_batch
from ..data.schema import id_of
from ..models.vlm import VisionLanguageModel


class Culprit(NamedTuple):
    """A sample that was found.

    Attributes:
        id: the dataset's own.
        uid: Opsin's number of it.
        rank: that had it.
        losses: keys that are not finite for it; ``gradient`` where the losses are.
    """

    id: str
    uid: int
    rank: int
    losses: tuple[str, ...] = ()


def samples_of(state: State) -> list[Culprit]:
    """All samples of this rank's device batch (no blank ones)."""
    batch = state.batch
    rows = batch["document_sample"]
    return _named(batch, rows, batch["document_uid"], ())


def second_look(state: State, *, gradients_too: bool) -> list[Culprit]:
    """Run the device batch again row by row, and say whose losses are not finite; all ranks must call it.

    Without a gradient, outside the data-parallel wrapper, with random numbers and the methods' own counts put back
    afterwards. A packed row is one: all its documents are named.

    Args:
        state: at ``AFTER_TRAIN_BATCH``: its batch is the whole device batch. Gradients must be gone.
        gradients_too: the losses were finite: differentiate each row (not under FSDP2, whose ranks would average).
    """
    model, batch = unwrap(state.model), state.batch
    methods = [a for a in state.algorithms if isinstance(a, VisionAlgorithm)]
    kept = {id(m): dict(vars(m)) for m in methods}
    held = (state.batch, state.loss, state.outputs)
    differentiate = gradients_too and not state.fsdp_enabled
    quiet, device = Logger(state), next(model.parameters()).device
    found: list[Culprit] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(differentiate):
        try:
            size = getattr(state.dataloader, "batch_size", None)
            for part in split_batch(dict(batch), 1, device_batch_size=size):
                state.batch = state.device.batch_to_device(part)
                keys = _not_finite(model, state, methods, quiet, differentiate)
                if keys:
                    found += _named(batch, part["document_sample"], part["document_uid"], keys)
        finally:
            state.batch, state.loss, state.outputs = held
            model.end_step()
            for method in methods:
                vars(method).clear()
                vars(method).update(kept[id(method)])
    return found


def _not_finite(
    model: VisionLanguageModel,
    state: State,
    methods: list[VisionAlgorithm],
    logger: Logger,
    differentiate: bool,
) -> tuple[str, ...]:
    """Keys of the loss of ``state.batch`` that are not finite."""
    _tell(Event.BEFORE_FORWARD, methods, state, logger)
    with get_precision_context(state.precision, state.precision_config):
        outputs: Any = model(state.batch)
        state.outputs = outputs
        losses: Any = model.loss(outputs, state.batch)
    state.loss = losses
    _tell(Event.AFTER_LOSS, methods, state, logger)
    keys = tuple(k for k, v in losses.items() if not bool(v.detach().isfinite().all()))
    if not keys and differentiate:
        trained = [p for p in model.parameters() if p.requires_grad]
        total = torch.stack([v.mean() for v in losses.values()]).sum()
        grads = torch.autograd.grad(total, trained, allow_unused=True)
        if not all(bool(g.isfinite().all()) for g in grads if g is not None):
            keys = ("gradient",)
    model.end_step()
    return keys


def _tell(event: Event, methods: list[VisionAlgorithm], state: State, logger: Logger) -> None:
    for method in methods:
        if method.match(event, state):
            method.apply(event, state, logger)


def _named(
    batch: dict[str, Any], samples: torch.Tensor, uids: torch.Tensor, keys: tuple[str, ...]
) -> list[Culprit]:
    """Samples of some rows: ``samples`` and ``uids`` are (B, D)."""
    pairs = zip(samples.flatten().tolist(), uids.flatten().tolist(), strict=True)
    rank = dist.get_global_rank()
    return [Culprit(id_of(batch["sample_ids"][s].tolist()), u, rank, keys) for s, u in pairs if s >= 0]
