"""WebDataset's tar files as a source of samples: members of one name, told apart by their endings.

Nothing is unpacked: a member's name is a key and never a path on this disk. Links, devices and folders are passed over.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from .fetch import Fetcher
from .pictures import MOST_BYTES, Unusable
from .rows import Columns, name_of
from .source import RowSource

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "tif", "tiff")
"""Endings of pictures; several in a sample are ``0.jpg``, ``1.jpg`` ..., taken in the order in which they lie there."""

TEXTS = ("txt", "caption", "text", "cls")
MOST_SAMPLE = 4 * MOST_BYTES
"""Most bytes of all members of one sample; nothing larger is read."""


class TarSource(RowSource):
    """Samples of tar files, one after the other. Their headers are read once; workers get places and read those.

    A sample's JSON (``.json``) is a conversation as :mod:`~opsin.data.convert.rows` knows them; without one, ``.txt`` or
    ``.cls`` is a caption. Other members have their ending as the name of their column.

    Args:
        files: uncompressed tars, in order.
        columns: which key or ending means what.
        fetcher: reads pictures that a sample's JSON names (URLs; paths in the folder).
        limit: take the first so many.

    Raises:
        UserError: a file is no tar, is compressed, or there is no sample.
    """

    kind = "webdataset"

    def __init__(
        self, files: Sequence[str | Path], columns: Columns, fetcher: Fetcher, limit: int | None = None
    ):
        super().__init__(columns, fetcher)
        self.files = [Path(file).expanduser() for file in files]
        self._tar, self._starts, self._ends = array("L"), array("Q"), array("Q")
        self._cut: dict[int, str] = {}
        digest, names = hashlib.sha1(), list[str]()
        for number, file in enumerate(self.files):
            digest.update(f"{file.name} {file.stat().st_size if file.is_file() else 0}\n".encode())
            for key, start, end in self._samples(file, number, digest):
                if len(names) == limit:
                    break
                self._tar.append(number)
                self._starts.append(start)
                self._ends.append(end)
                if end <= start:
                    self._cut[len(names)] = "the tar ends in the middle of this sample"
                names.append(key)
        if not names:
            raise UserError(f"{', '.join(f.name for f in self.files[:3])}: no sample in there")
        self.called(names)
        self.job = {"tars": digest.hexdigest(), "folder": fetcher.folder}

    def _samples(self, file: Path, number: int, digest: Any) -> Iterator[tuple[str, int, int]]:
        """Key, first byte and end of each sample; the end is 0 where the tar is cut within it."""
        key, start, end, headers = "", 0, 0, 0
        try:
            with file.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
                try:
                    for member in tar:
                        headers += 1
                        digest.update(
                            f"{member.name} {member.size} {member.mtime}\n".encode("utf-8", "replace")
                        )
                        tar.members.clear()  # type: ignore[attr-defined]  # or all of them stay in memory
                        if not member.isreg() or member.issparse():
                            continue
                        name = _key(member.name)[0]
                        if name != key and end:
                            yield key, start, end
                        if name != key:
                            key, start = name, member.offset
                        end = member.offset_data + -(-member.size // 512) * 512
                    whole = end <= file.stat().st_size
                except tarfile.ReadError:
                    whole = False
        except tarfile.ReadError as error:
            compressed = file.open("rb").read(4)[:3] in (b"\x1f\x8b\x08", b"BZh", b"\xfd7z", b"\x28\xb5\x2f")
            why = (
                "is compressed; unpack it first (pictures do not shrink)" if compressed else "is no tar file"
            )
            raise UserError(f"{file}: {why}") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        if end:
            yield key, start, end if whole else 0

    def rows(self, first: int, end: int) -> Iterator[tuple[str, str, Mapping[str, Any] | Unusable]]:
        """Samples ``first`` .. ``end`` - 1; a place is the tar and the sample's key."""
        opened: tuple[int, Any] = (-1, None)
        try:
            for position in range(first, end):
                number = self._tar[position]
                if number != opened[0]:
                    if opened[1] is not None:
                        opened[1].close()
                    opened = (number, self.files[number].open("rb"))
                yield self._row_of(opened[1], position)
        finally:
            if opened[1] is not None:
                opened[1].close()

    def _row_of(self, file: Any, position: int) -> tuple[str, str, Mapping[str, Any] | Unusable]:
        start, end = self._starts[position], self._ends[position]
        tar = self.files[self._tar[position]].name
        file.seek(start)
        if position in self._cut or end - start > MOST_SAMPLE:
            with tarfile.open(fileobj=io.BytesIO(file.read(1 << 16)), mode="r:", ignore_zeros=True) as head:
                key = _key(head.next().name)[0]  # type: ignore[union-attr]
            if position in self._cut:
                return key, f"{tar}/{key}", Unusable("cut archive", self._cut[position])
            fault = f"has {(end - start) / 2**20:.0f} MiB, a sample at most {MOST_SAMPLE >> 20}"
            return key, f"{tar}/{key}", Unusable("large sample", fault)
        key, found = "", list[tuple[str, bytes]]()
        with tarfile.open(fileobj=io.BytesIO(file.read(end - start)), mode="r:") as members:
            for member in members:
                if member.isreg() and not member.issparse():
                    key, ending = _key(member.name)
                    body = members.extractfile(member)
                    assert body is not None
                    found.append((ending, body.read()))
        place = f"{tar}/{key}"
        try:
            row = {"__key__": key, **_row(found)}
        except Unusable as fault:
            return key, place, fault
        return name_of(row, self.columns) or key, place, row


def _key(name: str) -> tuple[str, str]:
    """WebDataset's key and ending of a member: what stands before the first dot of its file's name, and behind it."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    text = f"{folder}{slash}{stem}".removeprefix("./")
    return text.encode("utf-8", "replace").decode(), ending.lower()


def _row(members: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """Columns of a sample out of its members' endings and bytes."""
    row: dict[str, Any] = {}
    pictures = [body for ending, body in members if ending.rpartition(".")[2] in PICTURES]
    for ending, body in members:
        kind = ending.rpartition(".")[2]
        if kind == "json":
            try:
                content = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise Unusable("conversation", f"its .{ending} is no JSON") from error
            row.update(content if isinstance(content, dict) else {"conversations": content})
        elif kind in TEXTS:
            try:
                row[ending] = body.decode().strip()
            except UnicodeDecodeError as error:
                raise Unusable("text", f"its .{ending} is no UTF-8") from error
        else:
            row[ending] = body
    if pictures:  # those that lie beside its JSON, not the paths that they had where the tar was made
        row = {**{k: v for k, v in row.items() if k not in ("image", "images")}, "image": pictures}
    return row
