"""Which sample stands where in an epoch: each exactly once, whatever the number of ranks and workers.

Streaming 0.13.0 deals an epoch's places to canonical nodes, ranks and workers, and repeats samples wherever a
division leaves a remainder (1,000 samples on 64 canonical nodes: 24 twice). Here the division is made without
remainders: one order of all places, a function of size, seed, epoch and canonical nodes alone, of which every
global batch takes the next share. What its end lacks is a *filler*: a place without a sample, which stands
in the batch as a blank row, so that all ranks have the same number of batches, micro-batches and samples.

The order is Streaming's own up to the last round over its canonical nodes, so checkpoints made with the stock
partition go on, and each node still reads its own shards. Wanted repeats (``repeat``, ``proportion``,
``epoch_size``) are places of their own and stay.

This replaces the batching method ``random`` (the default). ``stratified``, ``per_stream`` and
``device_per_stream`` partition each stream by themselves and keep Streaming's rule: they repeat, or leave out.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.batching import batching_methods
from streaming.base.shuffle import get_shuffle

FILLER = -2
"""In a grid of sample ids: a place without a sample. (-1 is upstream's "nothing here", which no batch has.)"""

EXACT = "opsin_exact"
"""Name under which :func:`exact_work` is known to Streaming, which finds batching methods by name."""

TAILS = ("fill", "drop", "share")
"""What becomes of the samples that make no whole global batch.

``fill``: a last batch as large as the others, filled up with blank rows (training); ``drop``: left out;
``share``: a last, shorter batch, with a blank row only on ranks that have a sample less (evaluation; one rank
has none).
"""


def epoch_order(size: int, canonical_nodes: int) -> NDArray[np.int64]:
    """All places of an epoch, in the order in which they are dealt.

    Each canonical node owns a contiguous part, as for Streaming's shuffling; they are dealt a place each in
    turn. Parts differ by at most one place: the last round takes those that have one more.

    Args:
        size: places of the epoch.
        canonical_nodes: parts; no more than ``size`` are made.

    Returns:
        (size,) a permutation of 0 .. size - 1.
    """
    nodes = min(canonical_nodes, size)
    if nodes == 0:
        return np.empty(0, np.int64)
    bounds = np.arange(nodes + 1, dtype=np.int64) * size // nodes
    starts, rounds = bounds[:-1], size // nodes
    whole = starts + np.arange(rounds, dtype=np.int64)[:, None]
    longer = np.diff(bounds) > rounds
    return np.concatenate([whole.ravel(), starts[longer] + rounds])


def places_a_rank(size: int, ranks: int, batch_size: int, tail: str) -> int:
    """Samples that each rank yields in an epoch, fillers included.

    Args:
        size: samples of the epoch, over all ranks.
        ranks: ranks that see different samples.
        batch_size: samples a device batch.
        tail: see :data:`TAILS`.
    """
    whole = ranks * (1 if tail == "share" else batch_size)
    return (size // whole if tail == "drop" else math.ceil(size / whole)) * whole // ranks


def deal(
    order: NDArray[np.int64],
    *,
    nodes: int,
    ranks_per_node: int,
    workers_per_rank: int,
    batch_size: int,
    tail: str,
) -> NDArray[np.int64]:
    """Deal what is left of an epoch to ranks and their workers.

    Global batch g is the g-th slice of ``nodes * ranks_per_node * batch_size`` entries, for any number of ranks
    and workers. Neighbours go to different nodes (as upstream: so a node keeps its canonical nodes' shards),
    then to different ranks. Fillers come last, on each worker too.

    Args:
        order: (n,) sample ids that are still to come, for all ranks.
        nodes, ranks_per_node, workers_per_rank: the world.
        batch_size: samples a device batch.
        tail: see :data:`TAILS`.

    Returns:
        (nodes, ranks a node, workers a rank, batches a worker, batch size), padded with -1.
    """
    ranks = nodes * ranks_per_node
    length = places_a_rank(len(order), ranks, batch_size, tail)
    stride = workers_per_rank * batch_size
    padded = math.ceil(length / stride) * stride
    grid = np.full((padded, ranks), -1, np.int64)
    places = grid[:length].reshape(-1)  # a view: rows of ``grid`` are contiguous
    places[: len(order)] = order[: len(places)]
    places[len(order) :] = FILLER
    grid = grid.reshape(padded // stride, workers_per_rank, batch_size, ranks_per_node, nodes)
    return np.ascontiguousarray(grid.transpose(4, 3, 1, 0, 2))


def exact_work(dataset: Any, world: Any, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """An epoch's arrangement, as Streaming's batching methods make it; called in one process a node.

    Args:
        dataset: a :class:`~opsin.data.streaming.StreamingVLMDataset`.
        world: ``streaming.base.world.World``.
        epoch: which epoch.
        sample_in_epoch: places of it that were dealt before, over all ranks.

    Returns:
        (nodes, ranks a node, workers a rank, batches a worker, batch size) sample ids, :data:`FILLER` and -1.
    """
    shuffle_units, samples = dataset.resample_streams(epoch)
    # A canonical node without a sample is an error in upstream's shuffling.
    nodes = min(dataset.num_canonical_nodes, len(samples))
    order = epoch_order(len(samples), nodes)[sample_in_epoch:]
    if dataset.shuffle and len(order):
        shuffle = get_shuffle(
            dataset.shuffle_algo,
            shuffle_units,
            nodes,
            dataset.shuffle_seed,
            epoch,
            dataset.shuffle_block_size,
        )
        order = shuffle[order]
    return deal(
        samples[order],
        nodes=world.num_nodes,
        ranks_per_node=world.ranks_per_node,
        workers_per_rank=world.workers_per_rank,
        batch_size=dataset.batch_size,
        tail=dataset.tail,
    )


batching_methods.setdefault(EXACT, exact_work)
