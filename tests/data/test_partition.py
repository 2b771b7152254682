"""The order of an epoch: each place once, the same global batches in any world, from any place in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming.base.batching.random import generate_work_random_batching as stock_work
from streaming.base.shuffle import algos
from streaming.base.world import World

from opsin.data.partition import FILLER, TAILS, deal, epoch_order, exact_work, places_a_rank

SIZES = (7, 1000, 1001, 1003)
GLOBAL_BATCH = 8


def like(sizes: tuple[int, ...], **options: Any) -> Any:
    """What the partition asks a dataset of shards of these sizes."""
    sizes = np.array(sizes, np.int64)
    made = SimpleNamespace(
        num_canonical_nodes=1, shuffle=True, shuffle_algo="py1e", shuffle_seed=5, shuffle_block_size=1 << 18,
        batch_size=2, tail="fill", partition_algo="relaxed", initial_physical_nodes=None, epoch_size=int(sizes.sum()),
        resample_streams=lambda epoch: (sizes, np.arange(sizes.sum())),
    )  # fmt: skip
    made.__dict__.update(options)
    return made


def shards(size: int) -> tuple[int, ...]:
    """Shards of a hundred samples, and one with the rest."""
    return (100,) * (size // 100) + ((size % 100,) if size % 100 else ())


def global_batches(
    dataset: Any,
    ranks: int = 1,
    workers: int = 1,
    seen: int = 0,
    epoch: int = 0,
    nodes: int = 1,
    work: Any = exact_work,
) -> list[list[list[int]]]:
    """Global batch -> rank -> sample ids, as a DataLoader takes batches from its workers in turn."""
    grid = work(dataset, World(nodes, ranks // nodes, workers, 0), epoch, seen)
    flat = grid.reshape(ranks, workers, -1, dataset.batch_size)
    steps = [flat[:, b % workers, b // workers] for b in range(flat.shape[1] * flat.shape[2])]
    return [batch for step in steps if any(batch := [[int(i) for i in r if i != -1] for r in step])]


def sets(batches: list[list[list[int]]]) -> list[list[int]]:
    """Global batches without the ranks."""
    return [sorted(i for rank in batch for i in rank) for batch in batches]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("canonical", [1, 2, 64])
@pytest.mark.parametrize("size", SIZES)
def test_each_sample_once_in_the_same_global_batches_for_any_ranks(
    size: int, canonical: int, workers: int
) -> None:
    orders = {}
    for ranks in (1, 2, 4):
        dataset = like(shards(size), num_canonical_nodes=canonical, batch_size=GLOBAL_BATCH // ranks)
        batches = global_batches(dataset, ranks, workers)
        assert len(batches) == -(-size // GLOBAL_BATCH)
        # All ranks have whole batches; a place that is no sample is a filler, at the very end.
        assert {len(rank) for batch in batches for rank in batch} == {GLOBAL_BATCH // ranks}
        orders[ranks] = sets(batches)
        flat = [i for batch in orders[ranks] for i in batch]
        assert sorted(i for i in flat if i != FILLER) == list(range(size))
        assert flat.count(FILLER) == -size % GLOBAL_BATCH == orders[ranks][-1].count(FILLER)
        # Two nodes deal the same global batches, too.
        if ranks > 1:
            assert sets(global_batches(dataset, ranks, workers, nodes=2)) == orders[ranks]
    assert orders[1] == orders[2] == orders[4]


@pytest.mark.parametrize("canonical", [1, 2, 64])
@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_goes_on_in_another_world_at_every_third_batch(size: int, canonical: int) -> None:
    worlds = [(1, 1), (2, 2), (4, 3)]
    make = lambda ranks: like(  # noqa: E731
        shards(size), num_canonical_nodes=canonical, batch_size=GLOBAL_BATCH // ranks
    )
    whole = sets(global_batches(make(1), epoch=1))
    for done in range(0, len(whole) + 1, 3):
        for ranks, workers in worlds:
            rest = global_batches(make(ranks), ranks, workers, seen=done * GLOBAL_BATCH, epoch=1)
            assert sets(rest) == whole[done:]
    assert global_batches(make(2), 2, 2, seen=len(whole) * GLOBAL_BATCH) == []


@pytest.mark.parametrize("algorithm", sorted(algos))
def test_the_order_changes_with_seed_and_epoch_and_with_nothing_else(algorithm: str) -> None:
    def order(seed: int, epoch: int, ranks: int = 1, canonical: int = 2, block: int = 200) -> list:
        dataset = like(
            shards(1003), shuffle_algo=algorithm, shuffle_seed=seed, num_canonical_nodes=canonical,
            batch_size=GLOBAL_BATCH // ranks, shuffle_block_size=block,
        )  # fmt: skip
        return sets(global_batches(dataset, ranks, epoch=epoch))

    assert order(1, 0) == order(1, 0) == order(1, 0, ranks=4)
    assert order(1, 0) != order(2, 0) and order(1, 0) != order(1, 1)
    for canonical in (1, 64, 1003, 5000):  # more nodes than samples: upstream repeats, or raises
        ids = [i for batch in order(3, 2, canonical=canonical) for i in batch if i != FILLER]
        assert sorted(ids) == list(range(1003))


def test_where_stock_streaming_repeats_nothing_the_order_is_its_own() -> None:
    for canonical, ranks, workers in ((1, 1, 1), (2, 2, 3), (8, 4, 2)):
        dataset = like(shards(1000), num_canonical_nodes=canonical, batch_size=GLOBAL_BATCH // ranks)
        ours, stock = (
            global_batches(dataset, ranks, workers, work=work) for work in (exact_work, stock_work)
        )
        assert ours == stock
    # Elsewhere it is up to the last round over canonical nodes: old checkpoints go on.
    dataset = like(shards(1000), num_canonical_nodes=64, batch_size=2)
    ours, stock = (sets(global_batches(dataset, 4, work=work)) for work in (exact_work, stock_work))
    assert ours[:120] == stock[:120] and ours != stock


@pytest.mark.parametrize(
    ("size", "canonical", "ranks", "repeated"),
    [(1000, 64, 1, 24), (1001, 1, 2, 1), (1001, 1, 4, 3), (7, 1, 4, 1)],
)
def test_stock_streaming_still_repeats(size: int, canonical: int, ranks: int, repeated: int) -> None:
    """When this fails, upstream has mended it, and ``data/partition.py`` may go."""
    dataset = like(shards(size), num_canonical_nodes=canonical)
    ids = [i for batch in sets(global_batches(dataset, ranks, work=stock_work)) for i in batch]
    assert len(ids) - len(set(ids)) == repeated and len(set(ids)) == size


@given(
    size=st.integers(0, 300), canonical=st.integers(1, 80), nodes=st.integers(1, 3), per_node=st.integers(1, 4),
    workers=st.integers(1, 4), batch=st.integers(1, 9), seen=st.integers(0, 320), tail=st.sampled_from(TAILS),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_size_world_and_place(
    size: int, canonical: int, nodes: int, per_node: int, workers: int, batch: int, seen: int, tail: str
) -> None:
    order = epoch_order(size, canonical)
    assert sorted(order.tolist()) == list(range(size))
    left, ranks = order[seen:], nodes * per_node
    grid = deal(
        left, nodes=nodes, ranks_per_node=per_node, workers_per_rank=workers, batch_size=batch, tail=tail
    )
    assert grid.shape[:3] == (nodes, per_node, workers) and grid.shape[4] == batch
    dealt = grid[grid >= 0].tolist()
    assert len(set(dealt)) == len(dealt)
    whole = len(left) // (ranks * batch) * ranks * batch
    assert set(dealt) == set(left[:whole].tolist() if tail == "drop" else left.tolist())
    a_rank = (grid != -1).sum((2, 3, 4))
    assert (a_rank == places_a_rank(len(left), ranks, batch, tail)).all()
    fillers = int((grid == FILLER).sum())
    assert fillers == {"drop": 0, "share": -len(left) % ranks, "fill": -len(left) % (ranks * batch)}[tail]
    # On a worker: samples, then fillers, then nothing.
    rows = grid.reshape(ranks * workers, grid.shape[3] * batch)
    kind = np.select([rows >= 0, rows == FILLER], [0, 1], 2)
    assert (np.diff(kind, axis=1) >= 0).all()
    # Each global batch is the next slice of the order.
    steps = grid.transpose(3, 2, 0, 1, 4).reshape(-1, ranks * batch)
    for g, step in enumerate(steps):
        ids = step[step >= 0]
        assert set(ids.tolist()) <= set(left[g * ranks * batch : (g + 1) * ranks * batch].tolist())
