"""Readers of question files: every form, pictures that are read later, addresses, and one line for each wrong input."""

from __future__ import annotations

import base64
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.evaluation.readers import (
    FORMS,
    FolderPicture,
    check_pictures,
    local_file,
    pictures_of,
    question_files,
    read_rows,
)
from opsin.evaluation.readers.addresses import ENDINGS, cached_folder
from opsin.evaluation.readers.parquet import KEPT, _ParquetPictures
from opsin.models.errors import UserError

from question_files import picture

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def text64(number: int) -> str:
    return base64.b64encode(picture(number)).decode()


def table(path: Path, rows: list[dict[str, Any]], delimiter: str = "\t") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def pictures(path: Path, column: str = "image", folder: Path | None = None) -> list[list[bytes]]:
    return [
        [read() for read in pictures_of(row[column], str(folder or path.parent), row.place)]
        for row in read_rows(str(path), (column,))
    ]


def test_each_ending_has_a_reader_and_is_known_to_addresses() -> None:
    assert tuple(FORMS) == ENDINGS


def test_json_as_lines_and_as_a_list(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "Ein Bär?", "image": "a.png"}, {"id": 2, "text": 'a "b"\n', "image": None}]
    (tmp_path / "a.png").write_bytes(picture(1))
    lines, whole = tmp_path / "q.jsonl", tmp_path / "q.json"
    lines.write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    whole.write_text(json.dumps(rows, indent=1))
    for file in (lines, whole):
        read = list(read_rows(str(file)))
        assert [row["text"] for row in read] == ["Ein Bär?", 'a "b"\n']
        assert [row.text("id") for row in read] == ["1", "2"]
        assert read[1].place == f"{file}: row 2" and read[1]["image"] == []
        assert pictures(file) == [[picture(1)], []]


@pytest.mark.parametrize(("ending", "delimiter"), [("tsv", "\t"), ("csv", ",")])
def test_tables_with_base64_names_and_lists_of_either(tmp_path: Path, ending: str, delimiter: str) -> None:
    (tmp_path / "sub").mkdir()
    for number in (1, 2):
        (tmp_path / "sub" / f"{number}.jpg").write_bytes(picture(number, "JPEG"))
    cells = [
        text64(3),
        f"data:image/png;base64,{text64(4)}",
        "sub/1.jpg",
        "['./sub/1.jpg', 'sub/2.jpg']",
        json.dumps([text64(5), text64(6)]),
        "",
    ]
    file = table(
        tmp_path / f"q.{ending}",
        [{"id": i, "q": "x\ty,\n", "image": c} for i, c in enumerate(cells)],
        delimiter,
    )
    jpegs = [picture(1, "JPEG"), picture(2, "JPEG")]
    assert pictures(file) == [
        [picture(3)], [picture(4)], jpegs[:1], jpegs, [picture(5), picture(6)], [],
    ]  # fmt: skip
    assert [row["q"] for row in read_rows(str(file))] == ["x\ty,\n"] * 6


def test_parquet_as_datasets_writes_it(tmp_path: Path) -> None:
    """Structs with bytes or a name, bytes alone, lists, missing ones; other columns with bytes are left out."""
    (tmp_path / "9.png").write_bytes(picture(9))
    own = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(5)]
    columns = {
        "struct": pa.array([*own[:3], {"bytes": None, "path": "9.png"}, None], STRUCT),
        "full": pa.array(own, STRUCT),
        "bytes": pa.array([picture(i) for i in range(5)]),
        "some": pa.array([picture(0), None, picture(2), None, picture(4)]),
        "lists": pa.array([[own[0], own[1]], [], None, [own[3]], [{"bytes": None, "path": "9.png"}, own[4]]], pa.list_(STRUCT)),
        "full_lists": pa.array([[one] * 2 for one in own], pa.list_(STRUCT)),
        "name": pa.array(["9.png", None, "", "9.png", text64(8)]),
    }  # fmt: skip
    wanted = {
        "struct": [[picture(0)], [picture(1)], [picture(2)], [picture(9)], []],
        "full": [[picture(i)] for i in range(5)],
        "bytes": [[picture(i)] for i in range(5)],
        "some": [[picture(0)], [], [picture(2)], [], [picture(4)]],
        "lists": [[picture(0), picture(1)], [], [], [picture(3)], [picture(9), picture(4)]],
        "full_lists": [[picture(i)] * 2 for i in range(5)],
        "name": [[picture(9)], [], [], [picture(9)], [picture(8)]],
    }
    file = tmp_path / "q.parquet"
    pq.write_table(
        pa.table({"n": [1.0, 2.0, None, 4.0, 5.0], "q": list("abcde"), **columns}), file, row_group_size=2
    )
    for column, pictures_wanted in wanted.items():
        assert pictures(file, column) == pictures_wanted, column
    rows = list(read_rows(str(file), ("full",)))
    assert list(rows[0]) == ["n", "q", "name", "full"]
    assert [row.optional("n") for row in rows] == ["1", "2", "", "4", "5"]
    assert rows[4].place == f"{file}: row 5"


def test_pictures_of_parquet_are_read_a_group_at_a_time_and_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "q.parquet"
    made = [picture(i) for i in range(12)]
    pq.write_table(pa.table({"q": ["?"] * 12, "image": pa.array([{"bytes": b, "path": None} for b in made], STRUCT)}), file, row_group_size=3)  # fmt: skip
    source = _ParquetPictures(file, "q")
    stored = [row["image"][0] for row in source.rows(("image",))]
    assert not source._kept
    assert [stored[i]() for i in (0, 5, 11, 1)] == [made[i] for i in (0, 5, 11, 1)]
    assert len(source._kept) == KEPT < 4 and {len(group) for group in source._kept.values()} == {3}
    assert [read() for read in stored] == made


def test_nothing_is_read_of_pictures_until_they_are_asked_for(tmp_path: Path) -> None:
    """Neither pictures in a folder nor base64, which is damaged here, nor is it kept in memory."""
    good = table(tmp_path / "q.tsv", [{"id": i, "image": "A" * 100_000} for i in range(20)])
    (row, *_) = rows = list(read_rows(str(good)))
    assert len(rows) == 20 and all(len(repr(row["image"])) < 1000 for row in rows)
    with pytest.raises(UserError, match=r"q\.tsv:2: image: is no picture"):
        row["image"][0]()
    (tmp_path / "a.png").write_bytes(b"no picture")
    (read,) = pictures_of(["a.png"], str(tmp_path), "q.tsv:7")
    check_pictures([read])
    with pytest.raises(UserError, match=r"q\.tsv:7: .*a\.png: is no picture"):
        read()


words = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=12)
value = st.one_of(words, st.text("\",\t\n\r ;'", max_size=6))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("tsv", "\t"), ("csv", ",")]),
    st.lists(st.tuples(value, value, value), min_size=1, max_size=5),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.binary(min_size=1, max_size=4),
)
def test_tables_give_back_what_was_written(
    form: tuple[str, str], rows: list[tuple[str, str, str]], quoting: Any, seed: bytes
) -> None:
    """Quotes, line breaks, delimiters and any text, also where the same record is read a second time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"q.{form[0]}"
        encoded = base64.b64encode(picture(seed[0])).decode()
        with file.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, delimiter=form[1], quoting=quoting, lineterminator="\r\n")
            writer.writerow(["a", "image", "b", "c"])
            writer.writerows([[a, encoded, b, c] for a, b, c in rows])
        read = list(read_rows(str(file)))
        assert [(row["a"], row["b"], row["c"]) for row in read] == rows
        assert [row["image"][0]() for row in read] == [picture(seed[0])] * len(rows)


def wrong(name: str, content: str | bytes, line: str) -> Any:
    return pytest.param(
        name, content.encode() if isinstance(content, str) else content, line, id=name + line[:12]
    )


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        wrong("q.txt", "x", "'.txt' is no form that can be read; use .json"),
        wrong("q.tsv", "", "is empty; its first line should name the columns"),
        wrong("q.tsv", "a\tb\n1\t2\t3\n", "q.tsv:2: 3 values under 2 columns"),
        wrong("q.csv", "a,b,a\n", "q.csv:1: column 'a' stands there twice"),
        wrong("q.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n', "q.csv:3: a quote is opened there and never closed"),
        wrong("q.csv", "a,b\r1,2\r", "q.csv:1: new-line character"),
        wrong("q.csv", b"a,b\n1,\xff\n", "q.csv:2: is no UTF-8"),
        wrong("q.tsv", "id\timage\n1\t[x\n2\t['a.png', 3]\n", "q.tsv:3: image: is neither a name of a picture nor base64"),
        wrong("q.csv", "id,image\n1,[x y]\n", "q.csv:2: image: starts as a list and is none"),
        wrong("q.json", "hello", "neither a JSON list of samples nor one sample a line"),
        wrong("q.jsonl", '{"a": 1}\n{"a": \n', "line 2 is no JSON"),
        wrong("q.json", "[1]", "row 1: no JSON object but a int"),
        wrong("q.json", '[{"image": {"a": 1}}]', "row 1: image: is neither a name"),
        wrong("q.parquet", "PAR1", "cannot be read as parquet"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_rows(str(tmp_path / name)))
    assert line in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (lambda p: local_file(f"{p}/Questoins.csv"), "no such file; did you mean 'Questions.csv'?"),
        (lambda p: local_file(str(p)), "is a folder"),
        (lambda p: question_files(str(p / "nowhere"), ["a.json"]), "nowhere: no such file"),
        (lambda p: question_files(str(p), ["a.json", "b.json"]), "has no a.json, b.json, nor *.parquet"),
        (lambda p: question_files(str(p), ["Questions.csv", "b.json"]), "has no b.json; add it"),
        (lambda p: pictures_of(["../secret.png"], str(p), "q:1"), "q:1: picture '../secret.png': leads out of"),
        (lambda p: pictures_of(["/etc/passwd.png"], str(p), "q:1"), "leads out of the folder"),
        (lambda p: pictures_of(["a\\b.png"], str(p), "q:1"), "leads out of the folder"),
        (lambda p: check_pictures(pictures_of(["a.png"], f"{p}/img", "q:1")), "img: no such folder; q:1 names 'a.png'"),
        (lambda p: check_pictures(pictures_of(["a.png", "Questions.csv"], str(p), "q:1")), "has no 'a.png' of q:1 (1 of 2 pictures"),
        (lambda p: FolderPicture(str(p), "a.png", "q:1")(), "a.png cannot be read (No such file"),
        (lambda p: next(read_rows(str(p / "Questions.csv"))).text("answr"), "Questions.csv:2: no column 'answr'; did you mean 'answer'?"),
        (lambda p: next(read_rows(str(p / "Questions.csv"))).text("answer"), "Questions.csv:2: nothing in column 'answer'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told_in_one_line(
    tmp_path: Path, act: Callable[[Path], object], line: str
) -> None:
    (tmp_path / "Questions.csv").write_text("id,answer\n1,\n")
    with pytest.raises(UserError) as caught:
        act(tmp_path)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_stray_quotes_are_read_as_pandas_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "q.tsv"
    file.write_text('a\tb\n5" wide\t"so" they say\n\n"x\ny"\tlast "one"\n')
    assert [tuple(row.values()) for row in read_rows(str(file))] == [
        ('5" wide', "so they say"), ("x\ny", 'last "one"'),
    ]  # fmt: skip
    assert [row.place for row in read_rows(str(file))] == [f"{file}:2", f"{file}:4"]


def test_files_and_pictures_from_an_object_store(s3: Path) -> None:
    """A file is looked at again each time, a picture is fetched once; both appear as a whole."""
    folder = s3 / "data" / "bench"
    (folder / "img" / "sub").mkdir(parents=True)
    (folder / "img" / "sub" / "1.png").write_bytes(picture(1))
    table(folder / "q.tsv", [{"id": 1, "image": text64(5)}, {"id": 2, "image": "sub/1.png"}])
    address, images = "s3://data/bench/q.tsv", "s3://data/bench/img"
    rows = list(read_rows(address))
    assert [row.place for row in rows] == [f"{address}:2", f"{address}:3"]
    reads = [pictures_of(row["image"], images, row.place)[0] for row in rows]
    check_pictures(reads)
    assert not cached_folder(images).exists()
    assert [read() for read in reads] == [picture(5), picture(1)]
    (folder / "img" / "sub" / "1.png").unlink()
    assert reads[1]() == picture(1)
    (folder / "img" / "sub" / "2.png").write_bytes(picture(2))
    with ThreadPoolExecutor(4) as pool:  # as ranks do, or a loader's threads
        same = [pool.submit(FolderPicture(images, "sub/2.png", "q:1")) for _ in range(4)]
        files = {pool.submit(local_file, address).result() for _ in range(4)}
    assert {one.result() for one in same} == {picture(2)} and len(files) == 1
    first = local_file(address)
    assert local_file(address) == first
    table(folder / "q.tsv", [{"id": 3, "image": text64(6)}, {"id": 4, "image": ""}])
    assert [row["id"] for row in read_rows(address)] == ["3", "4"]
    assert local_file(address) != first and reads[0]() == picture(5)
    left = [p for p in cached_folder(address).parent.rglob("*") if ".part" in p.name]
    assert not left
    assert question_files("s3://data/bench", ["a.json", "b.json"]) == [
        "s3://data/bench/a.json",
        "s3://data/bench/b.json",
    ]
    for act, line in (
        (lambda: list(read_rows("s3://data/bench/r.tsv")), "s3://data/bench/r.tsv: no such object in bucket 'data'"),
        (lambda: list(read_rows("s3://other/r.tsv")), "no bucket 'other'"),
        (lambda: FolderPicture(images, "none.png", "q.tsv:9")(), "q.tsv:9: s3://data/bench/img/none.png: no such object"),
        (lambda: list(read_rows("nfs://data/r.tsv")), "nfs://data/r.tsv: cannot be fetched"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            act()
        assert line in str(caught.value) and "\n" not in str(caught.value)


def test_readers_and_scorers_need_no_torch(tmp_path: Path) -> None:
    table(tmp_path / "q.tsv", [{"id": 1, "image": text64(5)}])
    pq.write_table(pa.table({"id": [1], "image": [picture(1)]}), tmp_path / "q.parquet")
    code = f"""
import sys
from opsin.evaluation import scorers
from opsin.evaluation.readers import read_rows
for name in ("q.tsv", "q.parquet"):
    (row,) = read_rows({str(tmp_path)!r} + "/" + name)
    assert row["image"][0]()[:4] == b"\\x89PNG"
heavy = {{"torch", "transformers", "streaming", "composer", "boto3"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
