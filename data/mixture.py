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

SMALL = 1024
"""Samples of a stream whose passes are shuffled all at once."""

_VISIT = 40
"""Bits of a place that hold the sample; those above hold how often its stream was walked through before."""


class Mixture:
    """The schedule of a run's streams, in global batches, and where events have changed it.

    Args:
        names: of the streams.
        phases: global batch at which each starts (the first is 0) and the weights of the streams from there on; a
            stream that is not named has 0.
        sizes: samples of each stream.
        global_batch: samples of all ranks a step.
        epoch_size: samples an epoch, a multiple of it.
        ramp: one of ``data.schedule.RAMPS``.
        batches: one of :data:`BATCHES`.
    """

    def __init__(
        self,
        names: Sequence[str],
        phases: Sequence[tuple[int, Mapping[str, float]]],
        *,
        sizes: Sequence[int],
        global_batch: int,
        epoch_size: int,
        ramp: str = "step",
        batches: str = "mixed",
    ):
        self.names, self.global_batch = list(names), global_batch
        self.epoch_batches = epoch_size // global_batch
        self._unit = global_batch if batches == "single" else 1  # samples that are counted as one
        self.phases = [
            (start, [float(weights.get(name, 0.0)) for name in names]) for start, weights in phases
        ]
        self.identity = stable_hash(
            "mixture",
            *self.names,
            list(map(int, sizes)),
            global_batch,
            epoch_size,
            ramp,
            batches,
            self.phases,
        )
        scale = global_batch // self._unit
        self._configured = Schedule(
            [start * scale for start, _ in self.phases], [w for _, w in self.phases], ramp
        )
        self._changes: list[list[Any]] = []
        self._since = 0
        self._parts: list[tuple[int, Schedule]] = [(0, self._configured)]

    def weights_at(self, batch: int) -> dict[str, float]:
        """Shares of the streams at a global batch, summing to 1."""
        schedule = self._parts[int(self._which(np.array([batch]))[0])][1]
        shares = schedule.weights_at(batch * self.global_batch // self._unit)
        return dict(zip(self.names, shares.tolist(), strict=True))

    def counts(self, batches: NDArray[np.int64]) -> NDArray[np.int64]:
        """Samples of each stream before each of these global batches: (N,) -> (N, S).

        Raises:
            ValueError: one belongs to an epoch that was over when an event changed the mixture.
        """
        counts = np.empty((len(batches), len(self.names)), np.int64)
        which = self._which(batches)
        for part in np.unique(which):
            rows = which == part
            counts[rows] = self._parts[part][1].counts(batches[rows] * (self.global_batch // self._unit))
        return counts * self._unit

    def _which(self, batches: NDArray[np.int64]) -> NDArray[np.int64]:
        """The part that each belongs to; what lies before all parts is the first one's to refuse."""
        return np.maximum(np.searchsorted([start for start, _ in self._parts], batches, "right") - 1, 0)

    def change(self, weights: Mapping[str, float], batch: int) -> None:
        """Other weights from a global batch on, where an epoch begins; what was served until then stays as it was."""
        self._set(
            [each for each in self._changes if each[0] < batch], self._since
        )  # said twice: the last one counts
        served = self.counts(np.array([batch]))[0] // self._unit
        shares = [float(weights.get(name, 0.0)) for name in self.names]
        # The epoch before needs what is in force there; for all that were before a checkpoint has no room.
        older = [each[0] for each in self._changes if each[0] <= batch - self.epoch_batches]
        since = older[-1] if older else self._since
        kept = [each for each in self._changes if each[0] >= since]
        self._set([*kept, [batch, shares, served.tolist()]], since)

    def _set(self, changes: list[list[Any]], since: int) -> None:
        """Changes (global batch, weights, served before), complete from the global batch ``since`` on."""
        if (changes, since) == (self._changes, self._since):
            return
        scale = self.global_batch // self._unit
        made = [
            (start, Schedule([start * scale], [weights], served=served)) for start, weights, served in changes
        ]
        self._changes, self._since = changes, since
        self._parts = [*([] if since else [(0, self._configured)]), *made]

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs; small, since Streaming hands it to workers on one page of memory."""
        return {"identity": self.identity, "changes": self._changes, "since": self._since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what events have changed."""
        self._set([list(each) for each in state.get("changes", ())], int(state.get("since", 0)))


def resume_state(prefix: int) -> dict[str, Any] | None:
    """The state that a dataset of this job was told last, by which its workers start an epoch; None: it was not."""
    try:
        memory = SharedMemory(name=_get_path(prefix, RESUME), create=False)
    except FileNotFoundError:
        return None
    return json.loads(bytes(memory.buf).split(b"\0")[0])


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


def small_passes(dataset: Any, stream: int, first: int, end: int) -> NDArray[np.int64]:
    """Passes ``first`` .. ``end`` - 1 over a stream of few samples, one after the other, all at once.

    An epoch may have very many of them. Every machine reads such a stream, so canonical nodes play no part.

    Returns:
        ((``end`` - ``first``) * n,) sample ids of the dataset.
    """
    size = int(dataset.samples_per_stream[stream])
    order = np.broadcast_to(np.arange(size), (end - first, size))
    if dataset.shuffle and size > 1:
        seed = stable_hash("mixture", dataset.shuffle_seed, dataset.stream_names[stream])
        order = keys(seed, torch.arange(first, end)[:, None], torch.arange(size)).numpy().argsort(1)
    return order.reshape(-1) + int(dataset.sample_offset_per_stream[stream])


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
        if size <= SMALL:
            start = low // size
            order = small_passes(dataset, s, start, -(-high // size))[
                low - start * size : high - start * size
            ]
            ids[batch, slot] = order + (np.arange(low, high) // size << _VISIT)
            wanted[batch, slot] = np.arange(low, high) % nodes
            continue
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
