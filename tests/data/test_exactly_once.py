"""Every sample exactly once an epoch, in an order that neither ranks nor workers nor a resumption change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import MDSWriter
from streaming.base.batching.random import generate_work_random_batching as stock_work
from streaming.base.shuffle import algos
from streaming.base.world import World

from opsin.data.batch import samples_in_batch, split_batch
from opsin.data.encode import Status
from opsin.data.loader import build_loader
from opsin.data.partition import FILLER, TAILS, deal, epoch_order, exact_work, places_a_rank
from opsin.data.schema import COLUMNS, pack_images
from opsin.data.streaming import StreamingVLMDataset, filler
from opsin.models.errors import UserError
from opsin.training.guards import SkippedSamples

import jobs
import zoo

SIZES = (7, 1000, 1001, 1003)
GLOBAL_BATCH = 8


def write(folder: Path, size: int, first: int = 0) -> str:
    """Tiny samples without pictures, about a hundred a shard."""
    with MDSWriter(out=str(folder), columns=COLUMNS, hashes=["xxh64"], size_limit=12000) as writer:
        for i in range(first, first + size):
            turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": f"{i}"}]
            writer.write({"id": f"{i}", "conversations": turns, "images": pack_images([]), "meta": {}})
    return str(folder)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """A folder of samples for each size."""
    root = tmp_path_factory.mktemp("sizes")
    return {size: write(root / str(size), size) for size in SIZES}


def open_(remote: str, **options: Any) -> StreamingVLMDataset:
    options = {"batch_size": 2, "shuffle": True, "shuffle_seed": 5, "tail": "fill", **options}
    return StreamingVLMDataset(remote=remote, **options)


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
    dataset: Any, ranks: int = 1, workers: int = 1, seen: int = 0, epoch: int = 0, nodes: int = 1, work: Any = exact_work
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
        ours, stock = (global_batches(dataset, ranks, workers, work=work) for work in (exact_work, stock_work))
        assert ours == stock
    # Elsewhere it is up to the last round over canonical nodes: old checkpoints go on.
    dataset = like(shards(1000), num_canonical_nodes=64, batch_size=2)
    ours, stock = (sets(global_batches(dataset, 4, work=work)) for work in (exact_work, stock_work))
    assert ours[:120] == stock[:120] and ours != stock


@pytest.mark.parametrize(
    ("size", "canonical", "ranks", "repeated"), [(1000, 64, 1, 24), (1001, 1, 2, 1), (1001, 1, 4, 3), (7, 1, 4, 1)]
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("size", "canonical"), [(7, 64), (1001, 64), (1003, 2)])
def test_a_loader_serves_each_sample_once_and_resumes(
    stored: dict[int, str], size: int, canonical: int, workers: int
) -> None:
    def batches(dataset: StreamingVLMDataset, workers: int = workers) -> list[list[str]]:
        return [[s["id"] for s in batch] for batch in build_loader(list, dataset, 8, num_workers=workers)]  # type: ignore[arg-type]

    dataset = open_(stored[size], batch_size=8, num_canonical_nodes=canonical)
    first, second = batches(dataset), batches(dataset)
    for served in (first, second):
        assert len(served) == -(-size // 8) and {len(b) for b in served} == {8}
        ids = [i for batch in served for i in batch]
        assert sorted(i for i in ids if i) == sorted(map(str, range(size))) and ids.count("") == -size % 8
    assert first != second or size == 7
    middle = len(second) // 2
    state = dataset.state_dict(8 * middle, True)
    for other in {0, 3 - workers} if size == 1003 else {workers}:
        resumed = open_(stored[size], batch_size=8, num_canonical_nodes=canonical)
        resumed.load_state_dict(state)
        assert batches(resumed, other) == second[middle:]
    # At the epoch's very end nothing is left; then the next epoch comes.
    ended = open_(stored[size], batch_size=8, num_canonical_nodes=canonical)
    ended.load_state_dict({**state, "epoch": 0, "sample_in_epoch": 8 * len(first)})
    assert batches(ended) == [] and batches(ended) == second


@pytest.mark.world
def test_two_ranks_serve_each_sample_once(stored: dict[int, str], ranks: Any) -> None:
    for size, canonical, tail, workers in ((7, 1, "fill", 0), (1001, 64, "fill", 2), (1003, 2, "share", 0)):
        options = {"shuffle": True, "shuffle_seed": 5, "num_canonical_nodes": canonical, "tail": tail}
        served = ranks.run(
            "jobs:served", remote=stored[size], batch_size=4, workers=workers, epochs=2, options=options
        )
        alone = open_(stored[size], batch_size=8, num_canonical_nodes=canonical, tail=tail)
        for epoch in range(2):
            both = [served[0][epoch], served[1][epoch]]
            assert [len(b) for b in both[0]] == [len(b) for b in both[1]]
            ids = [i for rank in both for batch in rank for i in batch]
            assert sorted(i for i in ids if i) == sorted(map(str, range(size)))
            assert ids.count("") == (-size % 8 if tail == "fill" else size % 2)
            one = [s["id"] for s in alone]
            for g, (a, b) in enumerate(zip(*both, strict=True)):
                assert sorted(i for i in a + b if i) == sorted(i for i in one[8 * g : 8 * g + 8] if i)


def test_wanted_repeats_stay_and_each_place_is_served_once(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 30), write(tmp_path / "b", 9, first=100)
    twice = StreamingVLMDataset(
        streams={"a": {"remote": a}, "b": {"remote": b, "repeat": 2}}, batch_size=8, tail="fill", shuffle=True
    )
    ids = [s["id"] for s in twice]
    assert len(ids) == 48 == len(twice) and len([i for i in ids if i]) == 48
    assert all(ids.count(str(i)) == 2 for i in range(100, 109)) and all(ids.count(str(i)) == 1 for i in range(30))
    mixed = StreamingVLMDataset(
        streams={"a": {"remote": a, "proportion": 0.5}, "b": {"remote": b, "proportion": 0.5}},
        batch_size=8, tail="fill", shuffle=True, epoch_size=50,
    )  # fmt: skip
    served = [s for s in mixed if not s.get("filler")]
    assert len(served) == 50 and len(mixed) == 56
    assert sum(s["stream"] == "b" for s in served) == 25
    # Repeats are of the stream, not of the partition: as even as they can be.
    assert {[s["id"] for s in served].count(str(i)) for i in range(100, 109)} <= {2, 3}
    # What partitions streams by itself keeps upstream's rule.
    stratified = StreamingVLMDataset(
        streams={"a": {"remote": a}, "b": {"remote": b}}, batch_size=8, batching_method="stratified", shuffle=True
    )
    assert all(not s.get("filler") for s in stratified)


@pytest.mark.parametrize(("tail", "batches"), [("fill", [4, 4]), ("drop", [4]), ("share", [4, 3])])
def test_what_becomes_of_the_tail(stored: dict[int, str], tail: str, batches: list[int]) -> None:
    dataset = open_(stored[7], batch_size=4, tail=tail, shuffle=False)
    loader = build_loader(list, dataset, 4, num_workers=0, drop_last=tail == "drop")  # type: ignore[arg-type]
    served = list(loader)
    assert [len(b) for b in served] == batches and len(loader) == len(batches)
    ids = [s["id"] for b in served for s in b]
    assert ids == [*map(str, range(7)), ""][: sum(batches)]
    if tail == "drop":
        small = open_(stored[7], batch_size=16, tail=tail)
        with pytest.raises(UserError, match="7 samples a rank make no batch of 16"):
            build_loader(list, small, 16, drop_last=True)  # type: ignore[arg-type]


def test_arguments_and_other_data_are_refused_in_one_line(stored: dict[int, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tail 'filled': unknown; did you mean 'fill'"):
        open_(stored[7], tail="filled")
    dataset = open_(stored[1000])
    list(zip(range(16), dataset, strict=False))
    state = dataset.state_dict(16, True)
    other = open_(stored[1001])
    with pytest.raises(UserError, match="16 samples into an epoch of 1000, and the data now has 1001"):
        other.load_state_dict(state)
    other.load_state_dict({**state, "sample_in_epoch": 0})  # between epochs data may grow
    del state["epoch_size"]
    open_(stored[1000]).load_state_dict(state)  # a checkpoint of stock Streaming


def test_a_checkpoint_between_epochs_begins_the_next_one(stored: dict[int, str]) -> None:
    """Composer asks at the end of an epoch when it counts 0 samples of the next; stock names the finished one."""
    dataset = open_(stored[1000], batch_size=8)
    assert dataset.state_dict(0, True)["epoch"] == 0  # not begun
    first = [s["id"] for s in dataset]
    assert dataset.state_dict(1000, True)["epoch"] == 0
    state = dataset.state_dict(0, True)
    assert (state["epoch"], state["sample_in_epoch"]) == (1, 0)
    second = [s["id"] for s in dataset]
    resumed = open_(stored[1000], batch_size=8)
    resumed.load_state_dict(state)
    assert resumed.state_dict(0, True)["epoch"] == 1  # asked again before it begins
    again = list(resumed)
    assert [s["id"] for s in again] == second != first and {s["visit"] for s in again} == {1}


@pytest.mark.parametrize("packing", [False, True])
def test_fillers_are_blank_keep_their_place_and_count_nowhere(packing: bool) -> None:
    collator = jobs.collator(zoo.build("llava"), packing=packing)
    real = [zoo.sample(i, images=i % 2) for i in range(3)]
    batch, alone = collator([*real, filler(1), filler(1)]), collator(real)
    assert batch["sample_status"].tolist() == [0, 0, 0, Status.PADDING, Status.PADDING]
    assert samples_in_batch(batch) == 5 and len(split_batch(batch, 2, device_batch_size=5)) == 3
    uids = lambda b: sorted(b["document_uid"][b["document_uid"] != 0].tolist())  # noqa: E731
    assert uids(batch) == uids(alone)
    for key in ("labels", "roles"):
        ignored = -100 if key == "labels" else 0
        assert int((batch[key] != ignored).sum()) == int((alone[key] != ignored).sum())
    parts = split_batch(batch, 2, device_batch_size=5)
    assert float(parts[0]["denominators"]["lm"]) == float(
        split_batch(alone, 1, device_batch_size=3)[0]["denominators"]["lm"]
    )
    # A whole batch of them, as a rank may have.
    blank = collator([filler(0)] * 4)
    assert samples_in_batch(blank) == 4 and len(split_batch(blank, 2, device_batch_size=4)) == 2
    assert not (blank["labels"] != -100).any() and not blank["images_per_row"].any()


def test_fillers_are_no_skipped_samples() -> None:
    logged: dict[str, float] = {}
    state = SimpleNamespace(
        batch={"sample_status": torch.tensor([0, 7, 7, 7], dtype=torch.int8), "truncated_turns": torch.zeros(4)},
        device=SimpleNamespace(tensor_to_device=lambda t: t),
    )
    guard = SkippedSamples(0.0, "skipped.jsonl")
    guard.load_state_dict({"counts": [5, 0, 0, 0, 0, 0, 0]})  # of a checkpoint that knew no padding
    guard.after_dataloader(state, None)  # type: ignore[arg-type]
    guard.fit_end(state, SimpleNamespace(log_metrics=logged.update))  # type: ignore[arg-type]
    assert logged == {"data/truncated_turns": 0, "data/skipped": 0}
