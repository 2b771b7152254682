"""Samples read from files that stay open: the same as Streaming's own reader gives, and never those of an older file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

from opsin.data import reader
from opsin.data.reader import OpenReader
from opsin.data.schema import COLUMNS, HASHES
from opsin.data.streaming import StreamingVLMDataset

import zoo

SAMPLES = [zoo.sample(i, images=i % 3, turns=1 + i % 2) for i in range(40)]


def write(folder: Path, samples: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> str:
    with MDSWriter(out=str(folder), columns=columns, hashes=list(HASHES), size_limit=4000) as writer:
        for sample in samples:
            writer.write(sample)
    return str(folder)


def test_every_encoding_reads_as_streamings_own_reader_reads_it(tmp_path: Path) -> None:
    columns = {
        "a": "str",
        "b": "int",
        "c": "uint16",
        "d": "json",
        "e": "bytes",
        "f": "float64",
        "g": "ndarray:int16:3",
    }
    rows = [
        {"a": "x" * i, "b": -i, "c": i, "d": {"i": [i]}, "e": bytes(i), "f": i / 3, "g": np.arange(3, dtype=np.int16) + i}
        for i in range(200)
    ]  # fmt: skip
    stock = StreamingDataset(local=write(tmp_path / "data", rows, columns), batch_size=1)
    assert len(stock.shards) > 2
    for shard in stock.shards:
        ours = OpenReader.of(shard)
        assert len(ours) == len(shard)
        for i in range(len(shard)):
            assert ours.get_sample_data(i) == shard.get_sample_data(i)
            one, other = ours[i], shard[i]
            assert list(one) == list(other) and all((one[k] == other[k]) is True or (one[k] == other[k]).all() for k in one)  # fmt: skip
        with pytest.raises(IndexError, match="is not present in the shard"):
            ours.get_sample_data(len(shard))


def test_few_files_stay_open_and_none_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "OPEN", 3)
    dataset = StreamingVLMDataset(remote=write(tmp_path / "data", SAMPLES), batch_size=1, shuffle=False)
    assert all(isinstance(shard, OpenReader) for shard in dataset.shards) and len(dataset.shards) > 3
    assert [s["id"] for s in dataset] == [s["id"] for s in SAMPLES]
    assert len(reader._open) == 3
    last: Any = dataset.shards[-1]
    before = len(list(Path("/proc/self/fd").iterdir()))
    OpenReader.evict(last)  # of a folder that is read in place nothing is evicted
    assert len(reader._open) == 2 and len(list(Path("/proc/self/fd").iterdir())) == before - 1
    with pytest.raises(FileNotFoundError):
        last.get_sample_data(0)


def test_a_dataset_written_anew_in_its_place_is_read_anew(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", SAMPLES)
    first = StreamingVLMDataset(remote=folder, batch_size=1, shuffle=False)
    assert first[3]["id"] == SAMPLES[3]["id"]
    shutil.rmtree(folder)
    write(tmp_path / "data", SAMPLES[10:])
    second = StreamingVLMDataset(remote=folder, batch_size=1, shuffle=False)
    assert [s["id"] for s in second] == [s["id"] for s in SAMPLES[10:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_compressed_shards_are_unpacked_where_they_lie(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "data"
    with MDSWriter(
        out=str(folder), columns=COLUMNS, hashes=list(HASHES), size_limit=4000, compression="zstd"
    ) as writer:
        for sample in SAMPLES:
            writer.write(sample)
    dataset = StreamingVLMDataset(remote=str(folder), batch_size=4, shuffle=True)
    for _ in range(2):
        loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=list, timeout=60 if workers else 0)
        assert sorted(s["id"] for b in loader for s in b) == sorted(s["id"] for s in SAMPLES)


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_that_somebody_has_deleted_are_fetched_again(s3: Path, own_cache: None, workers: int) -> None:
    dataset = StreamingVLMDataset(remote=write("s3://data/deleted", SAMPLES), batch_size=4, shuffle=True)  # type: ignore[arg-type]
    for _ in range(3):
        loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=list, timeout=60 if workers else 0)
        assert sorted(s["id"] for b in loader for s in b) == sorted(s["id"] for s in SAMPLES)
        for file in Path(dataset.streams[0].local).glob("shard.*"):
            file.unlink()
        for shard in list(reader._open.values()):
            shard.close()
        reader._open.clear()  # as of a process that had not read them


def test_a_dataset_is_indexed_as_streamings_own_is(tmp_path: Path) -> None:
    dataset = StreamingVLMDataset(remote=write(tmp_path / "data", SAMPLES), batch_size=1, shuffle=False)
    ids = [s["id"] for s in SAMPLES]
    assert dataset[-1]["id"] == ids[-1] and dataset[np.int64(3)]["id"] == ids[3]
    assert [s["id"] for s in dataset[2:9:3]] == ids[2:9:3]
    assert (
        [s["id"] for s in dataset[[5, -40]]]
        == [s["id"] for s in dataset[np.array([5, 0])]]
        == [ids[5], ids[0]]
    )
    for wrong in (40, -41):
        with pytest.raises(IndexError, match=f"sample {wrong} of 40"):
            dataset[wrong]


def test_where_files_are_evicted_none_stays_open(s3: Path, own_cache: None) -> None:
    address = write("s3://data/evicted", SAMPLES)  # type: ignore[arg-type]
    dataset = StreamingVLMDataset(remote=address, batch_size=1, shuffle=False, cache_limit="16kb")
    reader._open.clear()
    assert [dataset[i]["id"] for i in range(40)] == [s["id"] for s in SAMPLES]
    assert not reader._open


def test_processes_that_share_an_open_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    dataset = StreamingVLMDataset(remote=write(tmp_path / "data", SAMPLES * 5), batch_size=4, shuffle=True)
    [dataset[i] for i in range(0, 200, 3)]  # opened here, inherited by workers
    for _ in range(2):
        served = [
            s for batch in DataLoader(dataset, 4, num_workers=3, collate_fn=list, timeout=60) for s in batch
        ]
        wanted = {s["id"]: s["images"] for s in SAMPLES}
        assert len(served) == 200 and all(wanted[s["id"]] == s["images"] for s in served)
