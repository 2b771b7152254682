"""Before the first step: each thing that is wrong with a dataset is one line that says what, where and what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter

from opsin.data import object_store, remote
from opsin.data.messages import first_line, shown
from opsin.data.object_store import Unreachable, object_bytes
from opsin.data.patch_targets import COLUMN
from opsin.data.schema import COLUMNS, HASHES
from opsin.data.streaming import StreamingVLMDataset
from opsin.models.errors import UserError

import stores
import zoo
from ranks import RankPool

SAMPLES = [zoo.sample(i, images=i % 3, turns=1 + i % 2) for i in range(40)]
pytestmark = pytest.mark.usefixtures("own_cache")


def write(out: Any, columns: dict[str, str] = COLUMNS, **options: Any) -> str:
    """A dataset of several small shards."""
    options = {"hashes": list(HASHES), "size_limit": 4000, **options}
    with MDSWriter(out=str(out), columns=columns, **options) as writer:
        for sample in SAMPLES:
            writer.write({name: sample[name] for name in columns})
    return str(out)


def open_(remote: Any, **options: Any) -> StreamingVLMDataset:
    return StreamingVLMDataset(remote=str(remote), batch_size=1, shuffle=False, **options)


def refused(address: Any, *said: str, kind: type[UserError] = UserError, **options: Any) -> str:
    """The one line in which a dataset is refused: its address, and what else it must say."""
    with pytest.raises(UserError) as error:
        open_(address, **options)
    line = str(error.value)
    assert "\n" not in line and type(error.value) is kind, line
    for part in (str(address), *said):
        assert part in line, line
    return line


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard.*"))


def edit(folder: Path, change: Callable[[list[dict]], None]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"])
    (folder / "index.json").write_text(json.dumps(index))


# --- folders


@pytest.mark.parametrize("compression", [None, "zstd:1"])
def test_a_folder_has_all_its_shards_and_all_their_bytes(tmp_path: Path, compression: str | None) -> None:
    folder = Path(write(tmp_path / "data", compression=compression))
    assert open_(folder).num_samples == 40
    second = shards(folder)[1]
    good = second.read_bytes()
    second.write_bytes(good[:-1])
    refused(folder, f"{second} has {len(good) - 1:,} bytes, the index says {len(good):,}; copy it again")
    second.unlink()
    refused(
        folder,
        f"{second.with_suffix('') if compression else second} is not there, the index names it; copy it",
    )


def test_columns_are_those_that_training_reads(tmp_path: Path) -> None:
    lacking = write(tmp_path / "lacking", {n: e for n, e in COLUMNS.items() if n != "meta"})
    refused(lacking, "column 'meta' is not there in shard.00000.mds, 'json' is needed (it has ")
    folder = Path(write(tmp_path / "data"))

    def change(shards: list[dict]) -> None:  # of one shard in the middle: merged from two sources
        at = shards[2]["column_names"].index("conversations")
        shards[2]["column_encodings"][at] = "str"

    edit(folder, change)
    refused(folder, "column 'conversations' is 'str' in shard.00002.mds, 'json' is needed")


def test_every_shard_has_the_hash_that_is_checked(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "data"))
    edit(folder, lambda shards: shards[3]["raw_data"]["hashes"].pop("xxh64"))
    refused(folder, "shard.00003.mds was not written with the hash 'xxh64'")
    assert open_(folder, validate_hash="sha1").num_samples == open_(folder, validate_hash=None).num_samples


# --- what is cached


def test_the_disk_has_room_for_what_will_be_cached(s3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = write("s3://data/room")
    size = sum(shard.stat().st_size for shard in shards(s3 / "data" / "room"))
    usage = namedtuple("usage", "total used free")
    free = size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, free))
    refused(address, "are yet to be kept in ", "free; free some, set `local`", "cache_limit")
    assert open_(address, whole=False).num_samples == 40  # a few samples of it
    assert open_(address, cache_limit="16kb").num_samples == 40 and size > 16 * 1024
    free = size
    dataset = open_(address)
    dataset[0]  # here is the first shard now
    free = size - 1
    assert open_(address).num_samples == 40


def test_a_cache_of_fewer_shards_than_streaming_needs_is_refused(s3: Path) -> None:
    assert "Cache limit" in refused(write("s3://data/limit"), "at-least four times", cache_limit="8kb")


def test_a_cache_limit_never_deletes_somebodys_only_files(s3: Path, tmp_path: Path) -> None:
    mine, there = write(tmp_path / "mine"), write("s3://data/evicting")
    files = {file: file.read_bytes() for file in Path(mine).iterdir()}
    dataset = StreamingVLMDataset(
        streams={"a": {"remote": mine}, "b": {"remote": there}}, batch_size=1, shuffle=False,
        cache_limit="16kb", predownload=2,
    )  # fmt: skip
    assert [dataset[i]["id"] for i in range(80)] == 2 * [s["id"] for s in SAMPLES]
    assert {file: file.read_bytes() for file in Path(mine).iterdir()} == files  # stock deletes four of five
    kept = shards(Path(dataset.streams[1].local))
    assert 0 < sum(file.stat().st_size for file in kept) <= 16 * 1024


# --- stores


def test_a_store_has_the_first_shard_and_the_last(s3: Path) -> None:
    address = write("s3://data/ends")
    first, *_, last = shards(s3 / "data" / "ends")
    good = last.read_bytes()
    last.unlink()
    refused(address, f"{address}/{last.name}: no such object in bucket 'data'")
    last.write_bytes(good[:100])
    refused(address, f"{address}/{last.name} has 100 bytes, the index says", "copy it again")
    last.write_bytes(good)
    first.unlink()
    refused(address, f"{address}/{first.name}: no such object")


def test_stored_targets_of_their_own_are_looked_at_too(s3: Path, tmp_path: Path) -> None:
    from opsin.data.dataset_check import check_streams

    address = write("s3://data/side", {"id": "str", "meta": "json"})
    main = open_(write(tmp_path / "main"))

    class Joined:
        def __init__(self, one: Any, other: Any):
            self.parts = (one, other)

    from opsin.data.streams import open_stream

    side = open_stream("a", {"remote": address}, "auto")
    side.apply_default({"remote": None, "local": None, "split": "", "download_retry": 1, "download_timeout": 9,
                        "validate_hash": "xxh64", "keep_zip": False})  # fmt: skip
    theirs = side.get_shards(main._unique_rank_world, False)
    stream = main.streams[0]
    stream.targets = side
    pairs = [Joined(a, b) for a, b in zip(main.shards, theirs, strict=False)]
    with pytest.raises(UserError, match=f"{address}: column '{COLUMN}' is not there in shard.00000.mds"):
        check_streams([stream], [pairs])


def test_a_bucket_that_is_not_there_is_no_missing_object(s3: Path) -> None:
    refused("s3://nobody/x", "no bucket 'nobody' at http://127.0.0.1", "S3_ENDPOINT_URL")
    refused("s3://data/nothing-here", "no such object in bucket 'data'")
    refused("s3://a b/x", "'a b' is no name of a bucket")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "READ_SECONDS", 1)
    monkeypatch.setattr(object_store, "CONNECT_SECONDS", 1)


@pytest.mark.timeout(60)
def test_an_endpoint_that_never_answers_is_given_up(
    s3: Path, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)  # connections are made, and nothing is ever said
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
        refused("s3://data/x", f"{endpoint} does not answer", "S3_ENDPOINT_URL", kind=Unreachable)


def test_an_endpoint_that_is_not_there_is_named_without_its_password(
    s3: Path, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://me:hushhush@127.0.0.1:{port}")
    line = refused("s3://data/x", f"cannot connect to http://***@127.0.0.1:{port}", kind=Unreachable)
    assert "hushhush" not in line
    monkeypatch.setenv("S3_ENDPOINT_URL", "me:hushhush@127.0.0.1")
    assert "hushhush" not in refused_object("s3://data/x", "S3_ENDPOINT_URL is no address")


def refused_object(address: str, *said: str, kind: type[UserError] = UserError) -> str:
    with pytest.raises(UserError) as error:
        object_bytes(address)
    line = str(error.value)
    assert type(error.value) is kind and all(part in line for part in said) and "\n" not in line, line
    return line


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A store that looks at credentials, with one dataset; its environment."""
    with (
        stores.seaweedfs(tmp_path_factory.mktemp("weed")) as environment,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        import boto3

        boto3.client("s3", endpoint_url=environment["S3_ENDPOINT_URL"]).create_bucket(Bucket="data")
        write("s3://data/guarded")
        yield environment


STRANGER = {"AWS_ACCESS_KEY_ID": stores.STRANGER[0], "AWS_SECRET_ACCESS_KEY": stores.STRANGER[1]}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "nobody-knows-it"}, "does not know this access key; set AWS_ACCESS_KEY_ID and"),
        ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "secret key does not belong to the access key; set AWS_SECRET"),
        (STRANGER, "access denied: these credentials may not read it"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials; set AWS_ACCESS_KEY_ID and"),
    ],
    ids=["key", "secret", "denied", "none"],
)  # fmt: skip
def test_credentials_are_told_apart_and_never_shown(
    guarded: dict[str, str], environment: dict[str, str | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_("s3://data/guarded")[0]["id"] == SAMPLES[0]["id"]
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    line = refused("s3://data/guarded", said, kind=Unreachable)
    for name, value in os.environ.items():
        assert not (name.startswith("AWS_") and len(value) > 5 and value in line), name


def test_with_the_right_credentials_what_is_missing_is_said_to_be(guarded: dict[str, str]) -> None:
    refused("s3://nobody/x", "no bucket 'nobody'")
    refused("s3://data/nothing", "no such object in bucket 'data'")


# --- other stores, other ranks, other places


@pytest.mark.timeout(60)
def test_another_stores_client_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    never = threading.Event()
    monkeypatch.setattr(remote, "FETCH_SECONDS", 0.5)
    monkeypatch.setattr(remote.CloudDownloader, "direct_download", lambda *_: never.wait())
    refused("gs://bucket/x", "index.json: TimeoutError: no answer for 0.5 seconds", kind=Unreachable)
    never.set()


def test_no_message_shows_a_password_or_a_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_ACCOUNT_ACCESS_KEY", "c2VjcmV0c2VjcmV0")
    line = first_line(
        OSError("key c2VjcmV0c2VjcmV0 at sftp://me:hush@host/x and https://h/x?sig=abc is bad\nmore")
    )
    assert line == "OSError: key *** at sftp://***@host/x and https://h/x?*** is bad"
    assert shown("s3://bucket/folder@2/x") == "s3://bucket/folder@2/x"


@pytest.mark.world
def test_what_one_rank_finds_all_ranks_say(ranks: RankPool, tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "data"))
    shards(folder)[0].unlink()
    lines = ranks.run("jobs:refused_dataset", remote=str(folder))
    assert lines[0] == lines[1] and "shard.00000.mds is not there" in lines[0]
    assert ranks.run("jobs:refused_dataset", remote=write(tmp_path / "good")) == [None, None]
