"""The writer of all datasets: the same bytes however many processes make them and whenever they are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming import LocalDataset, MDSWriter

from opsin.data.schema import COLUMNS, HASHES
from opsin.data.sentences import SIDECAR, SentenceCounts, dataset_hash
from opsin.data.source import BadSample
from opsin.data.unfinished import WORK
from opsin.data.write import SKIPPED
from opsin.models.errors import UserError

from sources import Toy, files, in_a_process, killed_at, write_toy

pytestmark = pytest.mark.usefixtures("own_cache")
TOY = Toy((200, 90, 400, 10) * 6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted process writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    write_toy(out, TOY)
    return files(out)


def test_what_is_written_and_by_how_many(tmp_path: Path, whole: dict[str, bytes]) -> None:
    done: list[int] = []
    written = write_toy(tmp_path / "one", TOY, workers=1, progress=done.append)
    write_toy(tmp_path / "three", TOY, workers=3)
    assert files(tmp_path / "one") == files(tmp_path / "three") == whole
    assert sorted(whole) == ["index.json", SIDECAR, *(f"shard.{i:05}.mds" for i in range(len(whole) - 2))]
    assert len(whole) > 6 and done == list(range(1, 25)) and (written.samples, written.skipped) == (24, {})
    expected = SentenceCounts()
    samples = list(TOY.records(0, 24))
    for i, sample in enumerate(samples):
        if i % 3:
            expected.add(sample["conversations"])
    counts = SentenceCounts.load(tmp_path / "one" / SIDECAR)
    assert (counts.turns, counts.words) == (expected.turns, expected.words) == (16, 16 * 6)
    assert counts.counts == {"what is it": 16} and written.counts.counts == expected.counts
    assert counts.dataset == dataset_hash(whole["index.json"])
    assert [dict(s) for s in LocalDataset(str(tmp_path / "one"))] == samples
    with pytest.raises(UserError, match=r"one: not an empty folder; choose another one, or remove it"):
        write_toy(tmp_path / "one", TOY)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=24), st.integers(600, 2500))
def test_shards_are_cut_where_streaming_cuts_them(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write_toy(folder / "ours", Toy(tuple(sizes)), limit)
    index = json.loads((folder / "ours/index.json").read_text())["shards"]
    assert sum(s["samples"] for s in index) == len(sizes)
    assert all(s["samples"] and (s["samples"] == 1 or s["raw_data"]["bytes"] <= limit) for s in index)
    if any(s["raw_data"]["bytes"] > limit for s in index):
        return  # Streaming 0.13.0 writes an empty shard in front of a sample that is larger than a shard
    with MDSWriter(
        out=str(folder / "theirs"), columns=COLUMNS, hashes=list(HASHES), size_limit=limit
    ) as writer:
        for sample in Toy(tuple(sizes)).records(0, len(sizes)):
            writer.write(sample)
    ours, theirs = files(folder / "ours"), files(folder / "theirs")
    assert {name: ours[name] for name in theirs} == theirs


def test_killed_before_every_change_of_a_file(tmp_path: Path, whole: dict[str, bytes]) -> None:
    event, at_work, resumed = 0, True, []
    while at_work:
        event += 1
        out = tmp_path / f"{event}"
        at_work = killed_at(event, out, lambda out=out: write_toy(out, TOY))
        if (out / "index.json").exists():  # it comes last, whole
            assert {k: v for k, v in files(out).items() if WORK not in k} == whole
        try:
            write_toy(out, TOY, resumed=resumed.append)
        except UserError as error:  # killed while it removed what only a half dataset has
            assert "not an empty folder" in str(error)
        assert files(out) == whole, event
        assert not [p for p in out.iterdir() if p.name.startswith(WORK)]
    assert event > 60
    assert set(resumed) == {sum(_samples(whole)[:i]) for i in range(1, len(_samples(whole)) + 1)}


def _samples(whole: dict[str, bytes]) -> list[int]:
    return [shard["samples"] for shard in json.loads(whole["index.json"])["shards"]]


@pytest.mark.parametrize("group", [True, False])
def test_killed_with_and_without_its_workers(tmp_path: Path, whole: dict[str, bytes], group: bool) -> None:
    out, noted = tmp_path / "out", tmp_path / "workers"

    def kill(done: int) -> None:
        if done == 14:
            noted.write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
            os.killpg(0, signal.SIGKILL) if group else os.kill(os.getpid(), signal.SIGKILL)

    code = in_a_process(lambda: write_toy(out, TOY, workers=2, progress=kill))
    assert code == -signal.SIGKILL and not (out / "index.json").exists()
    workers = [int(pid) for pid in noted.read_text().split()]
    deadline = time.monotonic() + 60
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(workers) == 2 and not any(map(_runs, workers))  # nobody is left waiting for work
    done: list[int] = []
    write_toy(out, TOY, progress=done.append)
    assert done == list(range(done[0], 25)) and done[0] > 1  # starts at what is there
    assert files(out) == whole
    ids = Counter(sample["id"] for sample in LocalDataset(str(out)))
    assert ids == {f"toy/{i}": 1 for i in range(24)}


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_killed_worker_is_told_in_one_line(tmp_path: Path, whole: dict[str, bytes]) -> None:
    source, others = Toy(TOY.sizes * 4), multiprocessing.active_children()

    def kill(done: int) -> None:
        for worker in multiprocessing.active_children():
            if worker not in others:  # those of the ranks of other tests
                worker.kill()

    with pytest.raises(
        UserError, match=r"^a process that makes samples was killed .*the same command goes on"
    ):
        write_toy(tmp_path / "out", source, workers=1, progress=kill)
    assert not (tmp_path / "out/index.json").exists()
    write_toy(tmp_path / "out", source)
    assert LocalDataset(str(tmp_path / "out")).num_samples == 96


def test_another_job_and_another_process_are_refused(tmp_path: Path, whole: dict[str, bytes]) -> None:
    out, said = tmp_path / "out", []

    def second(done: int) -> None:
        if done == 12:
            with pytest.raises(UserError) as error:
                write_toy(out, TOY)
            said.append(str(error.value))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_toy(out, TOY, progress=second)
    assert said == [f"{out}: another process is writing there"]
    for source, limit, message in (
        (Toy(TOY.sizes[:-1]), 1500, r"another job \(samples: '24', now '23'\); give the same command"),
        (TOY, 1600, r"another job \(size_limit: '1500', now '1600'\)"),
    ):
        with pytest.raises(UserError, match=message) as error:
            write_toy(out, source, limit)
        assert "\n" not in str(error.value)
    next(out.glob("shard.00001.mds")).unlink()  # removed by somebody: written again
    write_toy(out, TOY)
    assert files(out) == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_ends_in_one_line(tmp_path: Path, whole: dict[str, bytes], workers: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError) as error:
        write_toy(out, Toy(TOY.sizes, fails=17), workers=workers)
    assert str(error.value) == "sample 17 cannot be made: ZeroDivisionError: no such colour"
    assert not (out / "index.json").exists()
    there: list[int] = []
    write_toy(out, TOY, resumed=there.append)
    assert there[0] > 8 and files(out) == whole


def test_bad_samples_are_named_or_left_out(tmp_path: Path) -> None:
    source, out = Toy(TOY.sizes, bad=(0, 7, 8, 9, 10, 23)), tmp_path / "out"
    with pytest.raises(
        UserError, match=r"^sample 0 \(id 'toy/0'\): 'a.png': no such file; .* with --skip-bad$"
    ):
        write_toy(out, source)
    assert write_toy(tmp_path / "same", source, skip_bad=True).skipped == {"missing picture": 6}

    def stop(done: int) -> None:
        if done == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_toy(out, source, skip_bad=True, progress=stop)
    with pytest.raises(UserError, match=r"^sample 0 "):  # left out by then, but not by this command
        write_toy(out, source)
    written = write_toy(out, source, skip_bad=True)
    assert (written.samples, written.skipped) == (18, {"missing picture": 6})
    assert files(out) == files(tmp_path / "same")
    named = [BadSample(**json.loads(line)) for line in (out / SKIPPED).read_text().splitlines()]
    assert [bad.position for bad in named] == list(source.bad)
    assert [s["id"] for s in LocalDataset(str(out))] == [f"toy/{i}" for i in range(24) if i not in source.bad]
    with pytest.raises(UserError, match=r"no sample to write \(3 missing picture\)"):
        write_toy(tmp_path / "none", Toy((1, 2, 3), bad=(0, 1, 2)), skip_bad=True)
    assert not (tmp_path / "none/index.json").exists()


def test_samples_that_become_bad_between_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="sample 17 cannot be made"):
        write_toy(out, Toy(TOY.sizes, fails=17))
    end = max(json.loads(note.read_text())["end"] for note in (out / WORK).glob("[0-9]*.json"))
    assert 0 < end < 17
    written = write_toy(out, Toy(TOY.sizes, bad=tuple(range(end, 24))), skip_bad=True)
    assert (written.samples, written.skipped) == (end, {"missing picture": 24 - end})
    named = [json.loads(line)["position"] for line in (out / SKIPPED).read_text().splitlines()]
    assert named == list(range(end, 24)) and LocalDataset(str(out)).num_samples == end


def test_a_full_disk_is_told_in_one_line(tmp_path: Path) -> None:
    source, out, said = Toy((200,) * 13 + (9000,) * 2), tmp_path / "out", tmp_path / "said"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))  # no file may be larger
        try:
            write_toy(out, source)
        except UserError as error:
            said.write_text(str(error))

    assert in_a_process(work) == 0
    assert (
        said.read_text() == f"{out}: cannot be written (File too large); the same command goes on once it can"
    )
    assert not (out / "index.json").exists()
    there: list[int] = []
    write_toy(out, source, resumed=there.append)
    write_toy(tmp_path / "whole", source)
    assert there == [13] and files(out) == files(tmp_path / "whole")


def test_killed_while_uploading(s3: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    landed, resumed, last = s3 / "data" / "killed", [], []
    for event in (1, 25, 37, 49, 61, 73, 85, 92, 120):
        out, folder = f"s3://data/killed/{event}", landed / str(event)
        last.append(killed_at(event, tmp_path, lambda out=out: write_toy(out, TOY)))
        if (folder / "index.json").exists():
            assert files(folder) == whole
        try:
            write_toy(out, TOY, resumed=resumed.append)
        except UserError as error:
            assert f"{out}: not empty" in str(error)
        assert files(folder) == whole, event
    assert last[0] and not last[-1]  # from the first change to none at all
    assert len(set(resumed)) > 3 and not list((tmp_path / "cache/partial").iterdir())


def test_killed_within_an_upload(s3: Path, tmp_path: Path) -> None:
    source = Toy((1 << 20,) * 6)
    write_toy(tmp_path / "whole", source, 1 << 21)
    for i, later in enumerate((0.002, 0.01, 0.03)):
        out = f"s3://data/within/{i}"
        killed_at(40, tmp_path, lambda out=out: write_toy(out, source, 1 << 21), later=later)
        try:
            write_toy(out, source, 1 << 21)
        except UserError as error:  # it was done before it was killed
            assert f"{out}: not empty" in str(error)
        assert files(s3 / "data/within" / str(i)) == files(tmp_path / "whole")


def test_a_store_that_fails_is_told_in_one_line(s3: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match=r"^s3://none/out: cannot be reached \(ClientError"):
        write_toy("s3://none/out", TOY)
    bucket, away = s3 / "data", s3 / "away"

    def vanish(done: int) -> None:
        if done == 15:
            while len(list((bucket / "failing").glob("*.mds"))) < 2:
                time.sleep(0.01)
            bucket.rename(away)

    out = "s3://data/failing"
    with pytest.raises(UserError) as error:
        write_toy(out, TOY, progress=vanish)
    assert str(error.value).startswith(f"{out}: cannot be written (") and "\n" not in str(error.value)
    if bucket.exists():
        bucket.rmdir()
    away.rename(bucket)
    assert not (bucket / "failing/index.json").exists()
    with pytest.raises(UserError, match="holds a part of another job"):
        write_toy(out, TOY, 1600)
    (bucket / "failing/shard.00000.mds").unlink()  # a shard that was noted, removed since
    write_toy(out, TOY)
    assert files(bucket / "failing") == whole
    with pytest.raises(UserError, match=rf"^{out}: not empty"):
        write_toy(out, TOY)
    with pytest.raises(UserError, match="sample 17 cannot be made"):
        write_toy("s3://data/other", Toy(TOY.sizes, fails=17))
    shutil.rmtree(bucket / "other")  # as the line of another job advises
    write_toy("s3://data/other", TOY, 1600)
    assert len(list((bucket / "other").glob("*.mds"))) > 3
