"""Rows of other people's data: what is a conversation, and what goes into quarantine with which reason."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import tarfile
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opsin.data.convert import fetch
from opsin.data.convert.convert import open_source, tar_files
from opsin.data.convert.fetch import Fetcher
from opsin.data.convert.hf import hf_files
from opsin.data.convert.ids import unique
from opsin.data.convert.pictures import Unusable, checked
from opsin.data.convert.rows import Columns, parse_columns, read_row
from opsin.data.schema import unpack_images
from opsin.data.source import BadSample
from opsin.models.errors import UserError

import forms

A = forms.picture(1)
PARTS = [{"type": "text", "text": "Look: "}, {"type": "image_url", "image_url": {"url": "http://a/b.png"}}]


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("row", "columns", "conversations", "pictures"),
    [
        ({"conversations": talk("Hi?", "Ho.")}, "", talk("Hi?", "Ho."), []),
        ({"conversations": talk("Hi?", "Ho."), "image": "a.png"}, "", talk("<image>\nHi?", "Ho."), ["a.png"]),
        ({"conversations": json.dumps(talk("Hi?", "Ho."))}, "", talk("Hi?", "Ho."), []),
        ({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}}, "", talk("a", "b"), []),
        (
            {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "ok"}]},
            "", talk("Look: <image>", "ok"), ["http://a/b.png"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                          {"role": "assistant", "content": "ok"}], "images": [{"bytes": A, "path": "x"}]},
            "", talk("<image>\n?", "ok"), [A],
        ),
        ({"texts": [{"user": "a", "assistant": "b"}, {"user": "c", "assistant": "d"}], "images": [A]},
         "", talk("<image>\na", "b", "c", "d"), [A]),
        ({"question": "a?", "answer": "b", "image": A}, "", talk("<image>\na?", "b"), [A]),
        ({"question": "a?", "answers": ["no", "yes", "yes"]}, "", talk("a?", "yes"), []),
        ({"question": "a?", "answers": [{"answer": "no"}, {"answer": "no"}]}, "", talk("a?", "no"), []),
        ({"q": "a?", "a": 3, "question": "not this"}, "question=q,answer=a", talk("a?", "3"), []),
        ({"question": ["a?", "b?"], "answer": ["1", "2"], "image": A}, "", talk("<image>\na?", "1", "b?", "2"), [A]),
        ({"caption": "A cat.", "jpg": A}, "", talk("<image>", "A cat."), [A]),
        ({"caption": ["A cat.", "One cat."], "image": [A, A]}, "", talk("<image>\n<image>", "A cat."), [A, A]),
        ({"cls": "7", "image": {"bytes": None, "path": "p.png"}}, "", talk("<image>", "7"), ["p.png"]),
        ({"conversations": talk("x", "y"), "caption": "told", "image": A}, "caption=caption",
         talk("<image>", "told"), [A]),
    ],
)  # fmt: skip
def test_what_a_row_says(row: dict, columns: str, conversations: list, pictures: list) -> None:
    read = read_row(row, parse_columns(columns))
    assert (read.conversations, read.pictures) == (conversations, pictures)
    assert read.independent == isinstance(row.get("question"), list)


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({}, "conversation", "neither a conversation nor an answer nor a caption"),
        ({"conversations": "no json"}, "conversation", "text that is no JSON"),
        ({"conversations": 3}, "conversation", "no list of turns"),
        ({"conversations": talk("alone")}, "conversation", "no sequence of question and answer"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "conversation", "a turn is from 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "conversation", "of type 'video'"),
        ({"question": "a", "answer": " "}, "empty answer", "an answer is empty"),
        ({"question": ["a"], "answer": "b"}, "conversation", "1 questions, and not as many answers"),
        ({"conversations": talk("<image> <image>", "b"), "image": A}, "marks", "2 <image> marks in the questions, 1"),
        ({"conversations": talk("<image>", "b")}, "marks", "1 <image> marks in the questions, 0 pictures"),
        ({"conversations": talk("a", "<image>"), "image": A}, "marks", "stands in an answer"),
        ({"caption": "a \ud800"}, "text", "half of a surrogate pair"),
        ({"caption": b"\xff"}, "text", "no UTF-8"),
        ({"caption": "a", "image": 3}, "image", "its picture is a int"),
        ({"caption": "a", "image": {"bytes": None, "path": None}}, "image", "neither bytes nor a path"),
        ({"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "a"}], "image": A},
         "marks", "both in the messages and in a column"),
    ],
)  # fmt: skip
def test_what_no_row_says(row: dict, reason: str, detail: str) -> None:
    with pytest.raises(Unusable) as error:
        read_row(row, Columns())
    assert error.value.args[0] == reason and detail in error.value.args[1]


@given(st.lists(st.sampled_from(["", "a", "b", "0", "1", "a#2", "a#1"]), max_size=8))
@settings(max_examples=200, deadline=None)
def test_every_id_is_one_of_its_own(names: list[str]) -> None:
    renamed = unique(names)
    ids = [renamed.get(i, n) for i, n in enumerate(names)]
    assert len(set(ids)) == len(ids) and all(ids)
    assert all(ids[i] == n for i, n in enumerate(names) if n and names.count(n) == 1)


def bomb(side: int) -> bytes:
    """A PNG of some hundred bytes that decodes to side * side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (bomb(10_000), "decompression bomb"),  # beyond Pillow's warning
        (bomb(30_000), "decompression bomb"),  # beyond its error
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "unreadable picture",
        ),  # would start Ghostscript
        (b"", "unreadable picture"),
        (A[:60], "unreadable picture"),
    ],
)
def test_what_is_no_picture(encoded: bytes, reason: str) -> None:
    with pytest.raises(Unusable) as error:
        checked(encoded)
    assert error.value.args[0] == reason and "0x" not in error.value.args[1]
    assert checked(A) is A


class Server(BaseHTTPRequestHandler):
    """Pictures, and what can go wrong with them."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        Server.asked.append(self.path)
        headers: dict[str, str] = {}
        status, body = 200, A
        self.path = self.path.partition("?")[0]
        if self.path == "/twice" and Server.asked.count("/twice") == 1:
            status, body = 503, b"later"
        elif self.path == "/gone":
            status, body = 404, b"no"
        elif self.path == "/html":
            body = b"<html>sign in</html>"
        elif self.path == "/huge":
            headers["Content-Length"] = str(10**12)
        elif self.path in ("/endless", "/moved-endless"):
            self.send_response(302 if "moved" in self.path else 200)
            self.send_header("Location", "/ok.png")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * (1 << 20))
            except OSError:
                return
        elif self.path == "/loop":
            status, headers = 302, {"Location": "/loop"}
        elif self.path == "/moved":
            status, headers = 302, {"Location": "/ok.png"}
        elif self.path == "/file":
            status, headers = 302, {"Location": "file:///etc/passwd"}
        elif self.path == "/drip":  # a byte now and then: no single wait is long
            self.send_response(200)
            self.send_header("Content-Length", str(len(A)))
            self.end_headers()
            try:
                for at in range(40):
                    self.wfile.write(A[at : at + 1])
                    threading.Event().wait(0.1)
            except OSError:
                pass
            return
        elif self.path == "/slow":
            threading.Event().wait(3)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


def test_pictures_by_url(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MOST_BYTES", 1 << 22)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(A)
    (tmp_path / "secret.png").write_bytes(A)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}/x.png"
    expected: dict[str, str] = {
        f"{server}/ok.png?token=secret": "",
        f"{server}/twice": "",
        f"{server}/moved": "",
        f"{server}/moved-endless": "",
        f"{server}/gone": "missing picture: the server answers 404",
        f"{server}/html": "unreadable picture: does not decode",
        f"{server}/huge": "large picture",
        f"{server}/endless": "large picture",
        f"{server}/loop": "unreachable picture: is redirected more than 5 times",
        f"{server}/file": "address: is redirected to something else",
        f"{server}/drip": "unreachable picture: it came too slowly",
        f"{server}/slow": "unreachable picture: cannot be fetched (ReadTimeout)",
        closed: "unreachable picture: cannot be fetched (ConnectionError)",
        "http://": "unreachable picture|address",
        "ftp://a/b.png": "address: ftp:// is none of",
        "a.png": "",
        f"file://{tmp_path}/in/a.png": "",
        str(tmp_path / "in" / "a.png"): "",
        "../secret.png": "path: leads out",
        str(tmp_path / "secret.png"): "path: leads out",
        "file:///etc/passwd": "path: leads out",
        "missing.png": "missing picture",
        "a\0.png": "path",
        "data:image/png;base64," + base64.b64encode(A).decode(): "",
        "data:image/png;base64,%%%": "unreadable picture: is no base64",
        "data:image/png,abc": "address: a data: address",
    }
    fetcher = Fetcher(str(tmp_path / "in"), timeout=2.0, retries=1, private=True)
    got = list(fetcher.fetch_all(list(expected)))
    for (place, want), found in zip(expected.items(), got, strict=True):
        said = "" if isinstance(found, bytes) else ": ".join(found.args)
        if not want:
            assert found == A, (place, said)
        else:
            assert any(w in said for w in want.split("|")), (place, said)
            assert "secret" not in said and "\n" not in said
    public = Fetcher(str(tmp_path / "in"), timeout=1.0, retries=0)
    asked = len(Server.asked)
    for place in (f"{server}/ok.png", "http://localhost/x", "http://169.254.169.254/latest", "http://[::1]/"):
        found = next(iter(public.fetch_all([place])))
        assert isinstance(found, Unusable) and found.args[0] == "private address", place
    assert len(Server.asked) == asked


def test_a_name_that_leads_elsewhere_the_second_time(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public when it is looked up, this machine when it is connected to: nothing is sent."""
    asked, look_up = len(Server.asked), socket.getaddrinfo
    answers = iter(["8.8.8.8", "127.0.0.1"])
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: look_up(next(answers), *a, **k))
    port = server.rpartition(":")[2]
    (found,) = Fetcher(str(tmp_path), timeout=1.0, retries=0).fetch_all(
        [f"http://pictures.example:{port}/ok.png"]
    )
    assert isinstance(found, Unusable) and found.args[0] == "private address"
    assert next(answers, None) is None and len(Server.asked) == asked


def test_jsonl_with_urls(server: str, tmp_path: Path) -> None:
    lines = [
        {"id": "a", "caption": "One.", "url": f"{server}/ok.png?sig=abcdefgh"},
        {"id": "a", "caption": "Two.", "url": f"{server}/gone?sig=abcdefgh"},
        {"caption": "Three."},
        "text",
    ]
    (tmp_path / "list.jsonl").write_text(json.dumps(lines))
    opened = open_source(str(tmp_path / "list.jsonl"), private=True)
    first, second, third, fourth = opened.source.records(0, 4)
    assert isinstance(first, dict) and unpack_images(first["images"]) == [A]
    assert first["meta"]["pictures"] == [f"{server}/ok.png?***"]  # a signature is a secret
    assert isinstance(second, BadSample) and (second.id, second.reason) == ("a", "missing picture")
    assert second.file == f"list.jsonl#1: {server}/gone?***"
    assert isinstance(third, dict) and third["id"] == "2" and third["conversations"][0]["value"] == ""
    assert isinstance(fourth, BadSample) and fourth.detail == "no JSON object but a str"
    (tmp_path / "odd.jsonl").write_text('{"x": 1, "y": 2}\n')
    with pytest.raises(
        UserError, match=r"odd.jsonl: none of the columns x, y makes a conversation .* --columns"
    ):
        open_source(str(tmp_path / "odd.jsonl"))
    with pytest.raises(UserError, match="there is no column 'z'; "):
        open_source(str(tmp_path / "odd.jsonl"), columns="caption=z")


def test_pictures_in_a_bucket(s3: Path, tmp_path: Path) -> None:
    (s3 / "data" / "pictures").mkdir()
    (s3 / "data" / "pictures" / "a.png").write_bytes(A)
    good, gone = Fetcher(str(tmp_path)).fetch_all(["s3://data/pictures/a.png", "s3://data/pictures/b.png"])
    assert good == A
    assert isinstance(gone, Unusable) and gone.args == ("missing picture", "the store answers 404")


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, body in members:
            forms.add(tar, name, body)
    return path


def test_members_of_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    link = tarfile.TarInfo("s/passwd.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    long = "very/" * 40 + "long"
    with tarfile.open(path, "w") as tar:
        forms.add(tar, "../../evil.txt", b"A name is a key.")
        forms.add(tar, "../../evil.png", A)
        tar.addfile(link)
        forms.add(tar, f"{long}.jpg", A)
        forms.add(tar, f"{long}.cls", b"7\n")
        forms.add(tar, "two.0.png", A)
        forms.add(tar, "two.1.png", forms.picture(2))
        forms.add(tar, "two.json", json.dumps({"caption": "Both.", "image": "elsewhere.png"}).encode())
        forms.add(tar, "bad.json", b"{")
        forms.add(tar, "bad.jpg", A)
        forms.add(tar, "list.json", json.dumps(talk("Hi?", "Ho.")).encode())
        forms.add(tar, "only.jpg", A)
    source = open_source(str(path)).source
    got = list(source.records(0, len(source)))
    ids = [r["id"] if isinstance(r, dict) else f"!{r.id}:{r.reason}" for r in got]
    assert ids == ["../../evil", long, "two", "!bad:conversation", "list", "!only:conversation"]
    assert not (tmp_path.parent / "evil.png").exists() and not list(tmp_path.rglob("*.png"))
    first, second, third = got[:3]
    assert isinstance(first, dict) and first["conversations"][1]["value"] == "A name is a key."
    assert isinstance(second, dict) and second["conversations"] == talk("<image>", "7")
    assert isinstance(third, dict) and unpack_images(third["images"]) == [A, forms.picture(2)]
    assert third["conversations"] == talk("<image>\n<image>", "Both.")


def test_tars_that_are_cut_compressed_or_none(tmp_path: Path) -> None:
    whole = make_tar(
        tmp_path / "a.tar", [(f"{i}.{e}", b) for i in range(3) for e, b in (("txt", b"t"), ("png", A))]
    )
    cut = tmp_path / "cut.tar"
    places = [m.offset_data for m in tarfile.open(whole)]  # noqa: SIM115
    cut.write_bytes(whole.read_bytes()[: places[-1] + 10])
    source = open_source(str(cut)).source
    assert len(source) == 3
    last = list(source.records(0, 3))[-1]
    assert isinstance(last, BadSample) and (last.id, last.reason) == ("2", "cut archive")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        forms.add(tar, "a.txt", b"x")
    (tmp_path / "no.tar").write_bytes(b"x" * 2000)
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    for name, message in (
        ("z", "is compressed; unpack it first"),
        ("no", "is no tar file"),
        ("empty", "no sample"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / f"{name}.tar"))
    for name in ("x-00.tar", "x-01.tar", "x-b.tar"):
        (tmp_path / name).touch()
    assert [f.name for f in tar_files(f"{tmp_path}/x-{{00..01}}.tar")] == ["x-00.tar", "x-01.tar"]
    assert [f.name for f in tar_files(f"{tmp_path}/x-{{01,b}}.tar")] == ["x-01.tar", "x-b.tar"]


def test_splits_and_files_of_a_data_set(tmp_path: Path) -> None:
    few = forms.records(4)
    forms.write_parquet(tmp_path / "hub", few, split="train")
    forms.write_parquet(tmp_path / "hub", few, files=1, split="test")
    assert [f.name for f in hf_files(tmp_path / "hub", "test")] == ["test-00000-of-00001.parquet"]
    with pytest.raises(UserError, match="has the splits test, train; say which with --split"):
        hf_files(tmp_path / "hub")
    with pytest.raises(UserError, match="--split 'tset': there is none; did you mean 'test'"):
        hf_files(tmp_path / "hub", "tset")
    for name in ("0000", "0001", "part-00002-a1b2c3.snappy", "val-1", "x_test.v2"):
        (tmp_path / "odd-names").mkdir(exist_ok=True)
        (tmp_path / "odd-names" / f"{name}.parquet").write_bytes(b"")
    found = {split: len(hf_files(tmp_path / "odd-names", split)) for split in ("train", "val", "test")}
    assert found == {"train": 3, "val": 1, "test": 1}
    forms.write_arrow(tmp_path / "saved" / "train", few)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(open_source(str(tmp_path / "saved")).source) == 4
    state = tmp_path / "saved" / "train" / "state.json"
    state.write_text(
        json.dumps({**json.loads(state.read_text()), "_indices_data_files": [{"filename": "i"}]})
    )
    with pytest.raises(UserError, match="save it after flatten_indices"):
        open_source(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="no Parquet or Arrow file; name one of its folders: data"):
        (tmp_path / "odd" / "data").mkdir(parents=True)
        open_source(str(tmp_path / "odd"), "hf")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UserError, match=r"bad.parquet: cannot be read"):
        open_source(str(tmp_path / "bad.parquet"))


def test_damaged_rows_go_into_quarantine(tmp_path: Path) -> None:
    rows = [{"id": str(i), "caption": f"It is {i}.", "image": forms.picture(i)} for i in range(12)]
    file = tmp_path / "x.parquet"
    pq.write_table(
        pa.Table.from_pylist(rows), file, row_group_size=4, write_page_checksum=True, compression="none",
        use_dictionary=False,
    )  # fmt: skip
    content = bytearray(file.read_bytes())
    at = content.index(rows[5]["image"][20:60])
    content[at] ^= 255
    file.write_bytes(bytes(content))
    got = list(open_source(str(file)).source.records(2, 10))
    assert [isinstance(r, BadSample) for r in got] == [False] * 2 + [True] * 4 + [False] * 2
    bad = got[2]
    assert isinstance(bad, BadSample) and (bad.reason, bad.file) == ("unreadable rows", "x.parquet#4")
    assert Image.open(io.BytesIO(unpack_images(got[0]["images"])[0])).size == (24, 24)  # type: ignore[index]
