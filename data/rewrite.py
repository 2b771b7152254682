"""A dataset written shard by shard along another one, so that a process that was killed goes on where it was.

Every shard has the samples of its source's shard, in their order. A shard is written whole and then noted;
what was not noted is written again. The index comes last: half a dataset does not look like a whole one.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..models.errors import UserError
from ..models.packaged import cache_folder
from .schema import HASHES, stable_hash
from .shards import refuse_local, refuse_remote

WORK = ".partial"
"""Folder inside a local dataset that is being written; gone when it is whole."""

_LARGEST = 2**32 - 1  # offsets inside a shard are uint32


def columns_of(shard: Any) -> dict[str, str]:
    """Columns of a shard: name -> encoding."""
    return dict(zip(shard.column_names, shard.column_encodings, strict=True))


def cells_of(shard: Any, row: bytes) -> dict[str, bytes]:
    """A stored row, cut into its columns' bytes as they are."""
    at, sizes = 0, []
    for size in shard.column_sizes:
        if not size:
            (size,) = struct.unpack_from("<I", row, at)
            at += 4
        sizes.append(size)
    cells = {}
    for name, size in zip(shard.column_names, sizes, strict=True):
        cells[name] = row[at : at + size]
        at += size
    return cells


def row_of(cells: Mapping[str, bytes], fixed: Sequence[str]) -> bytes:
    """Undo :func:`cells_of`; ``fixed``: columns whose encoding has one size, which is not stored."""
    names = sorted(cells)
    head = b"".join(struct.pack("<I", len(cells[name])) for name in names if name not in fixed)
    return head + b"".join(cells[name] for name in names)


class ShardWriter:
    """Writes the shards of one dataset, over several processes' lives if need be.

    Args:
        out: new or empty folder, or a remote one; or what an earlier process left of the same job.
        job: what is written; a process goes on only with the same.

    Attributes:
        done: number of a shard -> its entry of the index, for those that are finished.

    Raises:
        UserError: ``out`` holds something else, or another process is writing there.
    """

    def __init__(self, out: str, job: Mapping[str, Any]):
        self.remote = out if "://" in out else None
        if self.remote is None:
            self.folder = Path(out).expanduser()
            self.work = self.folder / WORK
        else:  # a remote folder cannot be asked cheaply what of it is whole; this machine remembers
            self.work = cache_folder() / "partial" / f"{stable_hash(out.rstrip('/')):016x}"
            self.folder = self.work / "staging"
        noted = self.work / "job.json"
        if not noted.is_file():
            self._refuse_other_things(out)
        self.work.mkdir(parents=True, exist_ok=True)
        self._uploader: Any = None
        self._lock = (self.work / "lock").open("w")
        try:  # the system lets go of it when the process is killed
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another process is writing there") from error
        wanted = json.loads(json.dumps(job))
        self.done = {int(p.stem): json.loads(p.read_text()) for p in self.work.glob("[0-9]*.json")}
        if noted.is_file() and self.done:
            self._refuse_other_job(out, json.loads(noted.read_text()), wanted)
        self._note(noted, wanted)
        shutil.rmtree(self.work / "staging", ignore_errors=True)
        (self.work / "staging").mkdir()

    def _refuse_other_things(self, out: str) -> None:
        if self.remote is None:
            left = [p for p in self.folder.iterdir() if p.name != WORK] if self.folder.is_dir() else []
            if left or not self.folder.is_dir():  # an empty work folder: killed before the job was noted
                refuse_local(self.folder)
            return
        with tempfile.TemporaryDirectory() as empty:
            refuse_remote(out, empty)

    @staticmethod
    def _refuse_other_job(out: str, there: dict[str, Any], wanted: dict[str, Any]) -> None:
        for key in sorted({*there, *wanted}):
            if there.get(key) != wanted.get(key):
                raise UserError(
                    f"{out}: holds a part of another job ({key}: '{there.get(key)}', now '{wanted.get(key)}'); give the "
                    "same command to go on with it, remove it, or choose another folder"
                )

    def write(self, number: int, columns: Mapping[str, str], rows: Sequence[bytes]) -> None:
        """Write one shard of rows (:func:`row_of`) and note it."""
        from streaming import MDSWriter

        size = sum(map(len, rows)) + 4 * len(rows) + 65536
        if size > _LARGEST:
            raise UserError(
                f"shard {number} would have {size / 2**30:.1f} GiB, a shard holds less than 4; write the source with "
                "smaller shards"
            )
        staging = self.work / "staging"
        with tempfile.TemporaryDirectory(dir=staging) as folder:
            writer = MDSWriter(
                out=folder, columns=dict(columns), hashes=list(HASHES), compression=None, size_limit=None
            )
            writer.shards = [{}] * number  # it numbers shards by those before
            writer.new_samples = list(rows)
            writer.flush_shard()
            writer.executor.shutdown(wait=True)
            entry = writer.shards[-1]
            self._put(Path(folder) / entry["raw_data"]["basename"])
        self._note(self.work / f"{number:05}.json", entry)
        self.done[number] = entry

    def index(self) -> bytes:
        """The index of all shards, once they are finished."""
        shards = [self.done[number] for number in range(len(self.done))]
        return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write files beside the index, then the index; forget the job."""
        with tempfile.TemporaryDirectory(dir=self.work / "staging") as folder:
            for name, content in {**files, "index.json": self.index()}.items():
                (Path(folder) / name).write_bytes(content)
                self._put(Path(folder) / name)
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def close(self) -> None:
        """Let another process go on."""
        self._lock.close()

    def _put(self, file: Path) -> None:
        """Move a whole file to where it belongs."""
        if self.remote is None:
            file.replace(self.folder / file.name)
            return
        from streaming.base.storage.upload import CloudUploader

        try:
            if self._uploader is None:
                self._uploader = CloudUploader.get((str(self.work / "staging" / "upload"), self.remote))
            file.replace(Path(self._uploader.local) / file.name)
            self._uploader.upload_file(file.name)
        except Exception as error:  # every store has its own errors
            raise UserError(
                f"{self.remote}: cannot be written ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            ) from error

    @staticmethod
    def _note(path: Path, content: Any) -> None:
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(content))
        partial.replace(path)
