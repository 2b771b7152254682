"""Every sample exactly once an epoch from real datasets and loaders, and what stands where none is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from streaming import MDSWriter

from opsin.data.batch import samples_in_batch, split_batch
from opsin.data.encode import Status
from opsin.data.loader import build_loader
from opsin.data.schema import COLUMNS, pack_images
from opsin.data.streaming import StreamingVLMDataset, filler
from opsin.models.errors import UserError
from opsin.training.guards import SkippedSamples

import jobs
import zoo

SIZES = (7, 1000, 1001, 1003)


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
            "jobs:served",
            timeout=240,
            remote=stored[size],
            batch_size=4,
            workers=workers,
            epochs=2,
            options=options,
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
    assert all(ids.count(str(i)) == 2 for i in range(100, 109)) and all(
        ids.count(str(i)) == 1 for i in range(30)
    )
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
        streams={"a": {"remote": a}, "b": {"remote": b}},
        batch_size=8,
        batching_method="stratified",
        shuffle=True,
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
        batch={
            "sample_status": torch.tensor([0, 7, 7, 7], dtype=torch.int8),
            "truncated_turns": torch.zeros(4),
        },
        device=SimpleNamespace(tensor_to_device=lambda t: t),
    )
    guard = SkippedSamples(0.0, "skipped.jsonl")
    guard.load_state_dict({"counts": [5, 0, 0, 0, 0, 0, 0]})  # of a checkpoint that knew no padding
    guard.after_dataloader(state, None)  # type: ignore[arg-type]
    guard.fit_end(state, SimpleNamespace(log_metrics=logged.update))  # type: ignore[arg-type]
    assert logged == {"data/truncated_turns": 0, "data/skipped": 0}
