"""A dataset that is being written, over several processes' lives if need be: whose it is and what of it is whole.

A file is written aside, moved or uploaded whole, and then noted; what was not noted is written again. The index comes
last: half a dataset does not look like a whole one.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ..models.errors import UserError
from ..models.packaged import cache_folder
from .messages import first_line, shown
from .schema import stable_hash

WORK = ".partial"
"""Folder inside a local dataset that is being written; gone when it is whole."""

_SPENT = ".partial-done"
"""What it is called while it is being removed."""

_FIRST = "shard.00000.mds"
"""File of a dataset's first shard, as Streaming names it."""


def work_folder(out: str) -> Path:
    """Where this machine notes what of a new dataset is whole; gone when all of it is."""
    if urlparse(out).scheme:
        return cache_folder() / "partial" / f"{stable_hash(out.rstrip('/')):016x}"
    return Path(out).expanduser() / WORK


class Unfinished:
    """A new dataset, or what an earlier process left of the same job.

    Args:
        out: new or empty folder, or a remote one; or what is left of the same job.
        job: what is written, as JSON; a process goes on only with the same.

    Attributes:
        remote: its address; None for a folder.
        folder: where its files are, or lie until they are uploaded.
        done: number of a shard -> its entry of the index, for those that are finished.

    Raises:
        UserError: ``out`` holds something else, cannot be written, or another process is writing there.
    """

    def __init__(self, out: str, job: Mapping[str, Any]):
        self.out = shown(out)
        self.remote = out if urlparse(out).scheme else None
        self._uploader: Any = None
        if self.remote is None:
            self.folder = Path(out).expanduser()
            self.work = work_folder(out)
            spent = self.folder / _SPENT
            self._refuse_folder()
        else:  # a remote folder cannot be asked cheaply what of it is whole; this machine remembers
            self.work = work_folder(out)
            self.folder = self.work / "staging"
            spent = self.work.with_name(self.work.name + _SPENT)
        self.staging, self._spent, self._job = self.work / "staging", spent, self.work / "job.json"
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = (self.work / "lock").open("w")
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}: {error.filename})") from error
        try:
            try:  # the system lets go of it when the process is killed
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.out}: another process is writing there") from error
            self.done: dict[int, dict[str, Any]] = {}
            self._claim(json.loads(json.dumps(job)))
        except BaseException:
            self._lock.close()
            raise

    def _claim(self, job: dict[str, Any]) -> None:
        shutil.rmtree(self._spent, ignore_errors=True)
        shutil.rmtree(self.staging, ignore_errors=True)
        (self.staging / "upload").mkdir(parents=True)
        there = self._names()
        for path in self.work.glob("[0-9]*.json"):
            number, note = int(path.stem), json.loads(path.read_text())
            if "shard" in note and (there is None or note["shard"]["raw_data"]["basename"] in there):
                self.done[number] = note["shard"]
        if not self.done:
            # Of a job without a note, its first shard may be here: killed before that was noted.
            ours = {_FIRST} if self._job.is_file() else set()
            others = sorted(set(there or ()) - ours)
            if others:
                shutil.rmtree(self.work, ignore_errors=True)
                self._refuse(others)
        elif self._job.is_file():
            self._refuse_other_job(json.loads(self._job.read_text()), job)
        self._write_note(self._job, job)

    def _refuse_folder(self) -> None:
        """Look at a local folder before anything is made in it."""
        if self.folder.exists() and not self.folder.is_dir():
            self._refuse([])
        if (self.work / "job.json").is_file() or not self.folder.is_dir():
            return
        others = self._names()
        if others:
            # Killed while the work folder of a finished dataset was being removed: take the rest of it away.
            shutil.rmtree(self.folder / _SPENT, ignore_errors=True)
            self._refuse(others)

    def _refuse(self, others: list[str]) -> None:
        if self.remote is None:
            raise UserError(f"{self.out}: not an empty folder; choose another one, or remove it")
        raise UserError(f"{self.out}: not empty ({others[0]} ...); choose another folder, or remove it")

    def _refuse_other_job(self, there: dict[str, Any], wanted: dict[str, Any]) -> None:
        for key in sorted({*there, *wanted}):
            if there.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.out}: holds a part of another job ({key}: '{there.get(key)}', now '{wanted.get(key)}'); "
                    "give the same command to go on with it, remove it, or choose another folder"
                )

    def _names(self) -> list[str] | None:
        """Names of the files of the dataset that are there; None: the store cannot list them."""
        if self.remote is None:
            found = self.folder.iterdir() if self.folder.is_dir() else ()
            return [path.name for path in found if path.name not in (WORK, _SPENT)]
        from streaming.base.storage.upload import CloudUploader

        try:
            self._uploader = CloudUploader.get((str(self.staging / "upload"), self.remote))
            listed = self._uploader.list_objects() or []
        except NotImplementedError:  # then what is there is overwritten file by file
            return None
        except Exception as error:  # every store has its own errors
            raise UserError(f"{self.out}: cannot be reached ({first_line(error)})") from error
        return [name.rpartition("/")[2] for name in listed]

    def put(self, file: Path) -> None:
        """Move a whole file to where it belongs.

        Raises:
            UserError: it cannot be moved or uploaded.
        """
        try:
            if self.remote is None:
                file.replace(self.folder / file.name)
            else:
                file.replace(Path(self._uploader.local) / file.name)
                self._uploader.upload_file(file.name)
        except Exception as error:  # every store has its own errors
            raise self.unwritable(error) from error

    def unwritable(self, error: BaseException) -> UserError:
        """What to say when a file cannot be written or uploaded."""
        why = getattr(error, "strerror", None) or first_line(error)
        return UserError(f"{self.out}: cannot be written ({why}); the same command goes on once it can")

    def note(self, number: int, content: Mapping[str, Any]) -> None:
        """Note a shard as finished. ``content``: its entry of the index under ``shard``, and whatever else."""
        self._write_note(self.work / f"{number:05}.json", content)
        self.done[number] = content["shard"]

    def noted(self, number: int) -> dict[str, Any]:
        """What :meth:`note` wrote."""
        return json.loads((self.work / f"{number:05}.json").read_text())

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write files in their order, the index last; forget the job."""
        for name, content in files.items():
            file = self.staging / name
            try:
                file.write_bytes(content)
            except OSError as error:
                raise self.unwritable(error) from error
            self.put(file)
        self.work.replace(self._spent)  # at once: a job is either known whole or forgotten
        shutil.rmtree(self._spent, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let another process go on."""
        self._lock.close()

    def _write_note(self, path: Path, content: Any) -> None:
        partial = path.with_suffix(".part")
        try:
            partial.write_text(json.dumps(content))
            partial.replace(path)
        except OSError as error:
            raise self.unwritable(error) from error
