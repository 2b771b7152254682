"""Samples from storage: the same as were written, from folders and from an S3 server, and no silent losses."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from torch.utils.data import DataLoader

from opsin.data.remote import read_sentence_counts
from opsin.data.schema import COLUMNS, HASHES, stable_hash
from opsin.data.sentences import SIDECAR, SentenceCounts
from opsin.data.streaming import StreamingVLMDataset
from opsin.models.errors import UserError

import zoo

SAMPLES = [zoo.sample(i, images=i % 3, turns=1 + i % 2) for i in range(40)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))


def write(out: Any, samples: list[dict] = SAMPLES, **options: Any) -> str:
    """A dataset of several small shards."""
    options = {"hashes": list(HASHES), "size_limit": 4000, **options}
    with MDSWriter(out=str(out), columns=COLUMNS, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return str(out)


def open_(remote: Any, **options: Any) -> StreamingVLMDataset:
    options = {"batch_size": 1, "shuffle": False, **options}
    return StreamingVLMDataset(remote=str(remote), **options)


def stored(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in COLUMNS}


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard.*.mds"))


def loader(dataset: StreamingVLMDataset, workers: int) -> DataLoader:
    return DataLoader(
        dataset, batch_size=4, num_workers=workers, collate_fn=list, timeout=60 if workers else 0
    )


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    assert len(shards(tmp_path / "data")) > 3
    dataset = open_(folder)
    assert [stored(s) for s in dataset] == SAMPLES
    assert [stored(dataset[i]) for i in (7, 0, 39)] == [SAMPLES[i] for i in (7, 0, 39)]
    assert not (tmp_path / "cache").exists()  # a folder is read in place


def test_ids_are_stable_and_visits_count_the_epochs(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    dataset = open_(folder, shuffle=True, shuffle_seed=3)
    first, second = list(dataset), list(dataset)
    assert {s["visit"] for s in first} == {0} and {s["visit"] for s in second} == {1}
    assert [s["id"] for s in first] != [s["id"] for s in second]
    for epoch in (first, second):
        assert {s["id"]: s["uid"] for s in epoch} == {
            s["id"]: stable_hash("sample", "default", s["id"]) for s in SAMPLES
        }
    # A resumed dataset goes on in the same epoch, with the same visits.
    state = dataset.state_dict(16, True)
    resumed = open_(folder, shuffle=True, shuffle_seed=3)
    resumed.load_state_dict({**state, "epoch": 1})
    rest = list(resumed)
    assert [(s["id"], s["visit"]) for s in rest] == [(s["id"], 1) for s in second[16:]]


def test_several_streams_keep_their_names_and_shares(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", SAMPLES[:20]), write(tmp_path / "two", SAMPLES[20:])
    dataset = StreamingVLMDataset(
        streams={"a": {"remote": one}, "b": {"remote": two, "repeat": 2}}, batch_size=1, shuffle=False
    )
    served = list(dataset)
    names = [s["stream"] for s in served]
    assert names.count("a") == 20 and names.count("b") == 40
    assert all((s["id"] in {x["id"] for x in SAMPLES[:20]}) == (s["stream"] == "a") for s in served)
    # The same sample in two streams is two samples.
    assert served[0]["uid"] == stable_hash("sample", "a", served[0]["id"])


def test_a_missing_shard_is_an_error_and_never_a_short_epoch(tmp_path: Path) -> None:
    write(tmp_path / "data")
    dataset = open_(tmp_path / "data")
    shards(tmp_path / "data")[2].unlink()  # before, it would not even be opened (test_dataset_check)
    with pytest.raises(RuntimeError, match="a shard could not be read") as error:
        list(loader(dataset, 0))
    assert "timed out" not in str(error.value)


def test_a_shard_missing_in_the_store_ends_every_worker_with_its_error(s3: Path) -> None:
    address = write("s3://data/missing")
    shards(s3 / "data" / "missing")[2].unlink()
    # Both workers want it; the one that waits for the other must not wait for ever.
    with pytest.raises(RuntimeError, match="a shard could not be read") as error:
        list(loader(open_(address, download_retry=1), 2))
    assert "timed out" not in str(error.value)


def test_a_corrupt_shard_is_an_error_in_every_run_and_never_stays_in_the_cache(s3: Path) -> None:
    address = write("s3://data/corrupt")
    target = shards(s3 / "data" / "corrupt")[1]
    good = target.read_bytes()
    target.write_bytes(good[:-10] + bytes(10))
    for _ in range(2):  # stock Streaming trusts the cache the second time
        dataset = open_(address, download_retry=1)
        with pytest.raises(RuntimeError, match="a shard could not be read"):
            list(loader(dataset, 0))
        assert not (Path(dataset.streams[0].local) / target.name).exists()
        del dataset
    target.write_bytes(good)
    assert [stored(s) for batch in loader(open_(address), 0) for s in batch] == SAMPLES


def test_a_shard_that_arrives_damaged_once_is_fetched_again(s3: Path) -> None:
    dataset = open_(write("s3://data/flaky"))
    downloader = dataset.streams[0]._downloader
    fetch, fetched = downloader._download_file_impl, []

    def flaky(remote: str, local: str, timeout: float) -> None:
        fetch(remote, local, timeout)
        fetched.append(Path(remote).name)
        if fetched.count("shard.00001.mds") == 1 and fetched[-1] == "shard.00001.mds":
            Path(local).write_bytes(Path(local).read_bytes()[:-3] + b"???")

    downloader._download_file_impl = flaky
    assert [stored(s) for s in dataset] == SAMPLES
    assert fetched.count("shard.00001.mds") == 2 and fetched.count("shard.00002.mds") == 1


def test_workers_never_share_the_parents_connections(s3: Path) -> None:
    dataset = open_(write("s3://data/forked"))
    served = [stored(s) for batch in loader(dataset, 2) for s in batch]
    assert sorted(served, key=lambda s: s["id"]) == sorted(SAMPLES, key=lambda s: s["id"])
    fresh = open_(write("s3://data/forked2"), validate_hash=None)
    assert fresh.streams[0]._downloader._s3_client is None
    # A sample read in the parent, as preflight does, opens a connection; workers that are forked now drop it.
    assert stored(fresh[3]) == SAMPLES[3]
    assert fresh.streams[0]._downloader._s3_client is not None
    served = [stored(s) for batch in loader(fresh, 2) for s in batch]
    assert sorted(s["id"] for s in served) == sorted(s["id"] for s in SAMPLES)


def test_scenes_written_to_a_bucket_stream_as_from_a_folder(s3: Path, tmp_path: Path) -> None:
    from opsin.training.data_commands import scenes

    for out in ("s3://data/scenes/train", str(tmp_path / "scenes")):
        scenes(out, 24, "uniform", "vqa", 7, ["objects=[1,2]", "charts=0", "sign=0"], 0)
    assert (s3 / "data" / "scenes" / "train" / "index.json").is_file()
    remote, local = open_("s3://data/scenes/train"), open_(tmp_path / "scenes")
    served = [s for batch in loader(remote, 2) for s in batch]
    assert sorted((s["id"], s["images"]) for s in served) == sorted((s["id"], s["images"]) for s in local)
    assert sorted(s["uid"] for s in served) == sorted(s["uid"] for s in local)
    assert remote.sentence_counts().counts == local.sentence_counts().counts
    with pytest.raises(UserError, match="not empty"):
        scenes("s3://data/scenes/train", 24, "uniform", "vqa", 7, [], 0)


@pytest.mark.parametrize("validate_hash", ["auto", "sha1", None])
def test_what_cannot_be_reached_is_one_line_with_its_address(
    s3: Path, validate_hash: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(remote: str) -> str:
        with pytest.raises(UserError) as error:
            open_(remote, validate_hash=validate_hash, download_retry=1)
        assert "\n" not in str(error.value) and remote in str(error.value)
        return str(error.value)

    started = time.monotonic()
    refused("s3://no-such-bucket/data")
    refused("s3://data/no-such-folder")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert "connect" in refused("s3://data/scenes").lower()
    assert time.monotonic() - started < 90  # a bound, no measurement: it must not wait for ever


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2}', '{"version": 2, "shards": []}'])
def test_a_broken_index_is_one_line(tmp_path: Path, content: str) -> None:
    write(tmp_path / "data")
    (tmp_path / "data" / "index.json").write_text(content)
    with pytest.raises(UserError) as error:
        open_(tmp_path / "data")
    assert "\n" not in str(error.value) and str(tmp_path / "data") in str(error.value)


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    for arguments, message in (
        ({"remote": folder, "streams": {"a": {"remote": folder}}}, "give either remote or streams"),
        ({}, "give either remote or streams"),
        ({"streams": {"a": {"remot": folder}}}, "dataset.streams.a.remot: unknown key; did you mean 'remote'"),
        ({"streams": {"a": {"proportion": 1.0}}}, "dataset.streams.a: needs remote"),
        ({"remote": str(tmp_path / "nothing")}, "no MDS dataset at"),
        ({"remote": folder, "validate_hash": "md5"}, "md5"),
        ({"remote": folder, "batching_method": "randon"}, "randon"),
        ({"remote": folder, "shuffle_algo": "py1ee"}, "shuffle_algo 'py1ee': unknown; did you mean 'py1e'"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            StreamingVLMDataset(**arguments, batch_size=1)
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("hashes", [["sha1", "xxh64"], ["sha1"], ["md5"], []])
def test_the_fastest_hash_that_was_written_is_the_one_checked(tmp_path: Path, hashes: list[str]) -> None:
    folder = write(tmp_path / "data", SAMPLES[:4], hashes=hashes)
    dataset = open_(folder)
    assert dataset.streams[0].validate_hash == (hashes[-1] if hashes else None)
    assert len(list(dataset)) == 4


def test_sentence_counts_come_from_beside_the_index_or_from_a_bounded_sample(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    dataset = open_(folder)
    assert dataset.sentence_counts() is None
    some, all_ = dataset.sentence_counts(sample=10), dataset.sentence_counts(sample=1000)
    pictured = [s for s in SAMPLES if "<image>" in json.dumps(s["conversations"])]
    expected = SentenceCounts()
    for sample in pictured:
        expected.add(sample["conversations"])
    assert all_.counts == expected.counts and 0 < some.turns < all_.turns
    expected.save(tmp_path / "data" / SIDECAR)
    expected = SentenceCounts.load(tmp_path / "data" / SIDECAR)  # rare sentences are not stored
    assert dataset.sentence_counts().counts == expected.counts
    assert read_sentence_counts(dataset.streams[0]).turns == expected.turns
    # Two streams together: the sum, and nothing if one has none.
    other = write(tmp_path / "other", SAMPLES[:6])
    both = StreamingVLMDataset(streams={"a": {"remote": folder}, "b": {"remote": other}}, batch_size=1)
    assert both.sentence_counts() is None
    assert both.sentence_counts(sample=5).turns > expected.turns


def test_data_written_anew_under_the_same_address_is_read_anew(s3: Path, tmp_path: Path) -> None:
    address = "s3://data/rewritten"
    write(address, SAMPLES[:6])
    first = StreamingVLMDataset(remote=address, batch_size=1, shuffle=False)
    assert [first[i]["id"] for i in range(6)] == [s["id"] for s in SAMPLES[:6]]
    shutil.rmtree(s3 / "data" / "rewritten")
    write(address, SAMPLES[1:8])
    second = StreamingVLMDataset(remote=address, batch_size=1, shuffle=False)
    assert [second[i]["id"] for i in range(second.num_samples)] == [s["id"] for s in SAMPLES[1:8]]
    mine = tmp_path / "mine"
    StreamingVLMDataset(remote=address, local=str(mine), batch_size=1, shuffle=False)
    shutil.rmtree(s3 / "data" / "rewritten")
    write(address, SAMPLES[:6])
    with pytest.raises(UserError, match="holds shards of another dataset"):
        StreamingVLMDataset(remote=address, local=str(mine), batch_size=1, shuffle=False)


def test_sentence_counts_of_other_shards_are_refused(tmp_path: Path) -> None:
    from opsin.data.sentences import SIDECAR, SentenceCounts, dataset_hash

    out = Path(write(tmp_path / "data", SAMPLES))
    counts = SentenceCounts(dataset=dataset_hash((out / "index.json").read_bytes()))
    counts.save(out / SIDECAR)
    dataset = StreamingVLMDataset(remote=str(out), batch_size=1, shuffle=False)
    assert dataset.sentence_counts() is not None
    SentenceCounts(dataset="0" * 40).save(out / SIDECAR)
    with pytest.raises(UserError, match="was made for other shards; make it anew with `opsin data templates"):
        dataset.sentence_counts()
