"""`opsin data convert`: every form gives the same samples; killed, with any number of workers, to a bucket."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from streaming import LocalDataset

from opsin.data.convert.convert import QUARANTINE, convert, open_source
from opsin.data.schema import unpack_images
from opsin.data.sentences import SIDECAR, SentenceCounts
from opsin.data.source import BadSample
from opsin.data.unfinished import WORK, work_folder
from opsin.models.errors import UserError

import forms
import runs
from sources import files, in_a_process, killed_at

pytestmark = pytest.mark.usefixtures("own_cache")

KIND = {"llava": "llava", "jsonl": "jsonl", "parquet": "hf", "arrow": "hf", "webdataset": "webdataset"}


@lru_cache
def samples() -> list[dict[str, Any]]:
    return forms.records()


def rows(folder: Path) -> list[tuple[str, Any, list[bytes]]]:
    return [(s["id"], s["conversations"], unpack_images(s["images"])) for s in LocalDataset(str(folder))]


@pytest.mark.parametrize("form", forms.WRITERS)
def test_every_form_gives_the_same_samples(tmp_path: Path, form: str) -> None:
    source = forms.WRITERS[form](tmp_path / "in", samples())
    opened = open_source(str(source))
    assert opened.kind == KIND[form] and len(opened.source) == len(samples())
    done: list[int] = []
    written = convert(tmp_path / "out", opened, size_limit=6000, progress=done.append)
    assert written.samples == forms.COUNT and not written.skipped and done == list(range(1, forms.COUNT + 1))
    expected = [(r["id"], forms.turns(r), [r["png"]] if r["png"] else []) for r in samples()]
    assert rows(tmp_path / "out") == expected
    assert not (tmp_path / "out" / QUARANTINE).exists()
    counts = SentenceCounts.load(tmp_path / "out" / SIDECAR)
    assert counts.turns == sum(bool(r["png"]) for r in samples())
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(index["shards"]) > 3 and all(
        set(s["raw_data"]["hashes"]) == {"sha1", "xxh64"} for s in index["shards"]
    )
    convert(tmp_path / "limited", open_source(str(source), limit=9), size_limit=6000)
    assert rows(tmp_path / "limited") == expected[:9]


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_ranges_are_those_of_the_whole(tmp_path: Path, form: str) -> None:
    source = open_source(str(forms.WRITERS[form](tmp_path / "in", samples()))).source
    whole = list(source.records(0, forms.COUNT))
    for first, end in ((0, 1), (6, 8), (13, 29), (19, 21), (39, 40)):
        assert list(source.records(first, end)) == whole[first:end]


def test_workers_change_nothing_and_a_kill_neither_loses_nor_doubles(tmp_path: Path) -> None:
    many = forms.records(120)
    for r in many[::17]:
        r["png"] = b"no picture"
    source = str(forms.write_parquet(tmp_path / "in", many, files=3))

    def write(out, **more):
        return convert(tmp_path / out, open_source(source), size_limit=6000, max_bad=0.1, **more)

    write("whole")
    whole = files(tmp_path / "whole")
    assert QUARANTINE in whole

    def kill(done: int) -> None:
        if done == 71:
            os.kill(os.getpid(), signal.SIGKILL)

    code = in_a_process(lambda: write("out", workers=2, progress=kill))
    assert code == -signal.SIGKILL and not (tmp_path / "out/index.json").exists()
    there: list[int] = []
    write("out", workers=1, resumed=there.append)
    assert 0 < there[0] < 71 and files(tmp_path / "out") == whole
    bad = [json.loads(line) for line in whole[QUARANTINE].splitlines()]
    assert [b["position"] for b in bad] == list(range(0, 120, 17))
    ids = Counter(s["id"] for s in LocalDataset(str(tmp_path / "out")))
    assert ids == {r["id"]: 1 for r in many if r["png"] != b"no picture"}


def test_killed_before_every_change_of_a_file(tmp_path: Path) -> None:
    few = forms.records(9)
    few[3]["png"] = b"no picture"
    source = str(forms.write_tars(tmp_path / "in", few, a_tar=4))

    def write(out: Path) -> Any:
        return convert(out, open_source(source), size_limit=2500, max_bad=0.5)

    write(tmp_path / "whole")
    whole, event, at_work = files(tmp_path / "whole"), 0, True
    while at_work:
        event += 1
        out = tmp_path / f"{event}"
        at_work = killed_at(event, out, lambda out=out: write(out))
        try:
            write(out)
        except UserError as error:  # killed while it removed what only a half dataset has
            assert "not an empty folder" in str(error)
        assert files(out) == whole, event
    assert event > 20


def test_too_many_bad_samples_end_it_and_are_named(
    tmp_path: Path, s3: Path, monkeypatch: Any, capsys: Any
) -> None:
    many = forms.records(50)
    for r in many[10:20]:
        r["png"] = b"no picture" if r["png"] else None
    file = forms.write_jsonl(tmp_path / "in", many)
    for out in (str(tmp_path / "out"), "s3://data/many"):
        typed = ("convert", str(file), "--out", out)
        code, _, said = runs.typed(monkeypatch, capsys, *typed)
        named = work_folder(out) / QUARANTINE
        assert (
            code == 2
            and f"{out}: more than 2 bad samples (3 unreadable picture); they are named in {named}" in said
        )
        assert "--max-bad 0.05 of 50" in said and len(said.strip().splitlines()) == 1
        first = json.loads(named.read_text().splitlines()[0])
        assert first == {
            "id": "s011", "position": 11, "file": "list.jsonl#11: s011.png", "reason": "unreadable picture",
            "detail": first["detail"],
        }  # fmt: skip
        assert "does not decode" in first["detail"]
        code, said, _ = runs.typed(monkeypatch, capsys, *typed, "--max-bad", "0.2", "--workers", "2")
        assert code == 0
        folder = Path(out) if "://" not in out else s3 / "data/many"
        assert said.strip().splitlines() == [
            f"42 samples in {out} (jsonl), 32 user turns with pictures",
            f"8 samples in quarantine, 16.00% (8 unreadable picture): {out}/{QUARANTINE}",
        ]
        assert len((folder / QUARANTINE).read_text().splitlines()) == 8
        assert json.loads((folder / "index.json").read_text())["shards"]
    assert files(tmp_path / "out") == files(s3 / "data/many")


def test_another_source_does_not_go_on_with_this_one(tmp_path: Path) -> None:
    first = str(forms.write_tars(tmp_path / "a", samples()))
    other = str(forms.write_tars(tmp_path / "b", forms.records(40, first=3)))

    def stop(done: int) -> None:
        if done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", open_source(first), size_limit=6000, progress=stop)
    for again, message in (
        (lambda: open_source(other), r"holds a part of another job \(folder"),
        (lambda: open_source(first, columns="image=png"), r"another job \(columns: '', now 'image=png'\)"),
    ):
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "out", again(), size_limit=6000)
    assert convert(tmp_path / "out", open_source(first), size_limit=6000).samples == 40
    assert not (tmp_path / "out" / WORK).exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (str(f / "nothing"), {}), "no such file or folder"),
        (lambda f: (str(f), {}), r"of no format that is known by its name; say --format llava\|hf"),
        (lambda f: (str(f), {"kind": "webdatset"}), "--format 'webdatset': unknown; did you mean 'webdataset'"),
        (lambda f: (str(forms.write_tars(f, samples())), {"columns": "questoin=q"}), "did you mean 'question'"),
        (lambda f: (str(forms.write_tars(f, samples())), {"columns": "question"}), "write meaning=NAME"),
        (lambda f: (str(forms.write_tars(f, samples())), {"images": "nowhere"}), "nowhere: no folder of pictures"),
        (lambda f: (str(f / "{0..2}.tar"), {}), "0.tar: no such file"),
        (lambda f: (str(forms.write_llava(f, samples())), {"columns": "image=x"}), "use --format jsonl"),
        (lambda f: (str(forms.write_llava(f, samples())), {"limit": 0}), "--limit 0"),
        (lambda f: (str(forms.write_tars(f, samples())), {"split": "test"}), "--split 'test': only Hugging Face"),
    ],
)  # fmt: skip
def test_what_is_no_source(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    source, options = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        open_source(source, options.pop("kind", "auto"), **options)
    assert "\n" not in str(error.value)


def test_records_say_where_they_come_from(tmp_path: Path) -> None:
    source = open_source(str(forms.write_arrow(tmp_path / "in", samples()))).source
    started = time.monotonic()
    record: Any = next(iter(source.records(12, 13)))
    assert not isinstance(record, BadSample) and time.monotonic() - started < 60
    assert record["meta"] == {"source": "hf", "place": "data-00001-of-00002.arrow#1"}
