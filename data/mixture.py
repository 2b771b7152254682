"""Several streams mixed by a schedule: which sample stands where is a pure function of the position in training.

A position counts samples over the whole run and all ranks. How many samples of each stream lie before it follows from
the schedule (``data/schedule.py``); which ones, from the stream's own endless chain of shuffled passes. So a stream
that is switched off keeps its place, no sample comes again before its stream is through, workers need no messages,
and a run goes on from any batch, with any number of workers and with another number of ranks at the same global batch.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from streaming.base.batching import batching_methods
from streaming.base.constant import RESUME
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _get_path
from streaming.base.shuffle import get_shuffle

from ..models.errors import UserError
from ..models.randomness import keys
from .partition import deal, epoch_order
from .schedule import Schedule
from .schema import stable_hash

SCHEDULED = "opsin_scheduled"
"""Name under which :func:`scheduled_work` is known to Streaming, which finds batching methods by name."""

BATCHES = ("mixed", "single")
"""``mixed``: each global batch has samples of all streams; ``single``: of one, as ViFT's code trains."""

_VISIT = 40
"""Bits of a place that hold the sample; those above hold how often its stream was walked through before."""


class Mixture:
    """The schedule of a run's streams, in global batches, and where an event has changed it.

    Args:
        names: of the streams.
        phases: global batch at which each starts (the first is 0) and the weights of the streams from there on; a
            stream that is not named has 0.
        global_batch: samples of all ranks a step.
        ramp: one of ``data.schedule.RAMPS``.
        batches: one of :data:`BATCHES`.
    """

    def __init__(
        self,
        names: Sequence[str],
        phases: Sequence[tuple[int, Mapping[str, float]]],
        *,
        global_batch: int,
        ramp: str = "step",
        batches: str = "mixed",
    ):
        self.names, self.global_batch, self.ramp = list(names), global_batch, ramp
        self._unit = global_batch if batches == "single" else 1  # samples that are counted as one
        self.configured = [
            [start, [float(weights.get(name, 0.0)) for name in names]] for start, weights in phases
        ]
        self.identity = stable_hash("mixture", *self.names, global_batch, ramp, batches, self.configured)
        self._changed: dict[str, Any] = {}
        self._schedule = self._build(self.configured, None)

    def _build(self, phases: Sequence[Any], served: Sequence[int] | None) -> Schedule:
        scale = self.global_batch // self._unit
        return Schedule([start * scale for start, _ in phases], [w for _, w in phases], self.ramp, served)

    def weights_at(self, batch: int) -> dict[str, float]:
        """Shares of the streams at a global batch, summing to 1."""
        shares = self._schedule.weights_at(batch * self.global_batch // self._unit)
        return dict(zip(self.names, shares.tolist(), strict=True))

    def counts(self, batches: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples of each stream before each of these global batches: (N,) -> (N, S)."""
        return self._schedule.counts(batches * (self.global_batch // self._unit)) * self._unit

    def change(self, weights: Mapping[str, float], batch: int) -> None:
        """Other weights from a global batch on, for good; what was served until then stays as it was."""
        served = self.counts(np.array([batch]))[0] // self._unit
        shares = [float(weights.get(name, 0.0)) for name in self.names]
        self._changed = {"phases": [[batch, shares]], "served": served.tolist()}
        self._schedule = self._build(**self._changed)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs; small, since Streaming hands it to workers on one page of memory."""
        return {"identity": self.identity, **self._changed}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take a change over that an event has made."""
        changed = {key: state[key] for key in ("phases", "served") if key in state}
        if changed != self._changed:
            self._changed = changed
            self._schedule = self._build(**changed) if changed else self._build(self.configured, None)


def shared_state(prefix: int) -> dict[str, Any] | None:
    """The mixture of the state that was last loaded in this job's parent process, for its workers."""
    try:
        memory = SharedMemory(name=_get_path(prefix, RESUME), create=False)
    except FileNotFoundError:
        return None
    return json.loads(bytes(memory.buf).split(b"\0")[0]).get("mixture")


def refuse_large(state: Mapping[str, Any]) -> None:
    """Refuse a state that Streaming has no room for.

    Raises:
        UserError: it has more bytes than a page.
    """
    size = len(json.dumps(state, sort_keys=True)) + 1
    if size > mmap.PAGESIZE:
        raise UserError(
            f"dataset: its state has {size:,} bytes, Streaming has room for {mmap.PAGESIZE:,}: fewer streams"
        )


def pass_order(dataset: Any, stream: int, number: int) -> tuple[NDArray[np.int64], int]:
    """One pass over a stream, and over how many canonical nodes it was dealt.

    Returns:
        (n,) sample ids of the dataset, each once; entry i belongs to canonical node ``i % nodes``.
    """
    first = int(dataset.shard_offset_per_stream[stream])
    sizes = dataset.samples_per_shard[first : first + int(dataset.shards_per_stream[stream])]
    nodes = min(dataset.num_canonical_nodes, int(sizes.sum()))
    order = epoch_order(int(sizes.sum()), nodes)
    if dataset.shuffle:
        seed = stable_hash("mixture", dataset.shuffle_seed, dataset.stream_names[stream]) % 2**31
        order = get_shuffle(dataset.shuffle_algo, sizes, nodes, seed, number, dataset.shuffle_block_size)[
            order
        ]
    return order + int(dataset.sample_offset_per_stream[stream]), nodes


def places(dataset: Any, first: int, end: int, nodes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples of the global batches ``first`` .. ``end`` - 1, by stream, and the machine that should read each.

    Returns:
        (B, global batch) int64, the sample's id and, above :data:`_VISIT` bits, its stream's passes before this one;
        (B, global batch) int64, 0 .. ``nodes`` - 1.
    """
    mixture: Mixture = dataset.mixture
    counts = mixture.counts(np.arange(first, end + 1))
    taken = np.diff(counts, axis=0)
    slots = np.cumsum(taken, 1) - taken
    ids = np.empty((end - first, mixture.global_batch), np.int64)
    wanted = np.zeros_like(ids)
    for s, size in enumerate(dataset.samples_per_stream):
        low, high = int(counts[0, s]), int(counts[-1, s])
        batch = np.repeat(np.arange(end - first), taken[:, s])
        slot = np.arange(low, high) - counts[batch, s] + slots[batch, s]
        for number in range(low // size, -(-high // size)):
            order, canonical = pass_order(dataset, s, number)
            a, b = max(low, number * size), min(high, (number + 1) * size)
            at = np.arange(a - number * size, b - number * size)
            where = batch[a - low : b - low], slot[a - low : b - low]
            ids[where] = order[at] + (number << _VISIT)
            wanted[where] = at % canonical % nodes
    return ids, wanted


def scheduled_work(dataset: Any, world: Any, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """An epoch's arrangement, as Streaming's batching methods make it; called in one process a node.

    Args:
        dataset: a :class:`~opsin.data.streaming.StreamingVLMDataset` with a :class:`Mixture`.
        world: ``streaming.base.world.World``.
        epoch: which epoch.
        sample_in_epoch: samples of it that were dealt before, over all ranks: whole global batches.

    Returns:
        (nodes, ranks a node, workers a rank, batches a worker, batch size) places (see :func:`places`), or -1.
    """
    size, each = dataset.mixture.global_batch, dataset.epoch_size // dataset.mixture.global_batch
    first, end = epoch * each + sample_in_epoch // size, (epoch + 1) * each
    ids, wanted = places(dataset, first, end, world.num_nodes)
    if dataset.shuffle:  # else each rank would see the streams in turn
        seed = stable_hash("mixture", dataset.shuffle_seed)
        key = keys(seed, torch.arange(first, end)[:, None], torch.arange(size)).numpy() & (2**_VISIT - 1)
    else:
        key = np.broadcast_to(np.arange(size), ids.shape)
    # By machine, so that each reads its own shards as far as the batch allows; neighbours are dealt to different ones.
    order = np.argsort(key + (wanted << _VISIT), axis=1)
    order = order.reshape(len(ids), world.num_nodes, size // world.num_nodes)
    ids = np.take_along_axis(ids, order.transpose(0, 2, 1).reshape(ids.shape), 1)
    return deal(
        ids.reshape(-1),
        nodes=world.num_nodes,
        ranks_per_node=world.ranks_per_node,
        workers_per_rank=world.workers_per_rank,
        batch_size=dataset.batch_size,
        tail="fill",
    )


def split_places(found: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sample ids (-1 where there is none) and visits of places."""
    return np.where(found < 0, found, found & (2**_VISIT - 1)), np.maximum(found >> _VISIT, 0)


batching_methods.setdefault(SCHEDULED, scheduled_work)
