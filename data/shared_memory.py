"""A job's own names for what Streaming shares between its processes, gone when the job is.

Streaming 0.13.0 names shared memory by small numbers (``000000_locals`` ...) and locks by files of the same names in
the temporary folder, for all jobs of the machine alike, and takes the first number that looks free. So

* two jobs that open a dataset in the same instant take the same one (``FileExistsError``);
* what a killed job leaves is never removed: lock files add up, and each new dataset walks through all of them.

Here a job is all ranks of one launch, or one process. It has a token in its names, and a folder for its locks.
Each process holds a shared ``flock`` on a file in that folder as long as it lives; whoever can lock that file alone
knows that the job is dead, whatever killed it, and that its names may go. (A recorded process id would not do: it is
given to another process, and means nothing in another container.)

Two jobs over one cache would evict each other's shards, which Streaming used to see by its shared numbers:
:func:`own_cache` gives the second job another folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from multiprocessing import util
from pathlib import Path
from typing import Any

from ..models.errors import UserError

SEGMENTS = Path("/dev/shm")
"""Where Linux keeps shared memory; elsewhere it cannot be listed."""

_ALIVE, _BUSY, _CACHE_LOCK = "alive", "busy", ".opsin.lock"
_LINGER, _INTRODUCE = 15.0, 2.0
"""Most seconds that workers outlive a killed job (torch looks every 5), and that a job needs to say who it is."""

_TOKEN = re.compile(r"[0-9a-f]{8}")


class Prefix(int):
    """Streaming's number of a dataset, written with the job's token.

    Streaming makes each name as ``f"{prefix:06}_{what}"``. The token travels with the dataset into workers, also
    where those are spawned. A name has 30 characters at most, as macOS wants.
    """

    token: str

    def __new__(cls, number: int, token: str) -> Prefix:
        """Number ``number`` of the job ``token``."""
        made = super().__new__(cls, number)
        made.token = token
        return made

    def __getnewargs__(self) -> tuple[int, str]:
        return int(self), self.token

    def __format__(self, spec: str) -> str:
        return f"{self.token}{int(self):03x}" if spec else str(int(self))


class Job:
    """This process's part in its job: a token, a folder, and the lock that says that it lives."""

    def __init__(self, root: Path, launch: str | None):
        self.pid, self.root, self.launch = os.getpid(), root, launch
        self.held: list[int] = []
        self.token = secrets.token_hex(4)
        if launch is not None:
            self.token = hashlib.blake2b(
                f"{launch} {socket.gethostname()}".encode(), digest_size=4
            ).hexdigest()
        self.folder = root / self.token
        with _locked(root):
            _clean(root)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._alive = _open(self.folder / _ALIVE)
            fcntl.flock(self._alive, fcntl.LOCK_SH)
        # Below 0: after daemonic workers were joined, and after Streaming's own clean-up at exit.
        util.Finalize(None, self.leave, exitpriority=-100)

    def leave(self) -> None:
        """This process ends; if it is the job's last, so do its names."""
        if os.getpid() != self.pid:
            return
        with contextlib.suppress(OSError), _locked(self.root):
            for held in [self._alive, *self.held]:
                os.close(held)
            self.held = []
            _clean(self.root)


_job: Job | None = None


def job() -> Job:
    """The job of this process; a process that was forked for other work than loading data is a job of its own.

    Raises:
        UserError: its folder cannot be made.
    """
    global _job
    if _job is None or _job.pid != os.getpid():
        root = (
            SEGMENTS if os.access(SEGMENTS, os.W_OK) else Path(tempfile.gettempdir())
        ) / f"opsin-{os.getuid()}"
        try:
            root.mkdir(mode=0o700, exist_ok=True)
            if root.is_symlink() or root.stat().st_uid != os.getuid():
                raise UserError(
                    f"{root}: belongs to another user, and Opsin's locks lie there; have it removed"
                )
            _job = Job(root, _launch())
        except OSError as error:
            raise UserError(
                f"{root}: Opsin's locks cannot be kept there ({error.strerror or error})"
            ) from error
    return _job


def _launch() -> str | None:
    """What all ranks of a launch have in common; None for a single process."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return None
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    return " ".join(os.environ.get(name, "") for name in names)


def private_names() -> None:
    """Let datasets that are opened from now on have the job's own names and locks."""
    from streaming.base import dataset
    from streaming.base.shared import prefix

    mine = job()

    def numbers() -> Iterator[Prefix]:
        return (Prefix(number, mine.token) for number in count())

    modules: tuple[Any, ...] = (prefix, dataset)
    modules[0]._each_prefix_int = numbers
    for module in modules:
        module.gettempdir = lambda: str(mine.folder)


def own_cache(folder: Path, *, given: bool) -> Path:
    """A folder for copies of shards that no other job uses at the moment; for the job's life.

    Args:
        folder: the one to take if it is free.
        given: somebody asked for just this one; else its name may get a number.

    Raises:
        UserError: another job uses the one that was asked for.
    """
    mine = job()
    note = (
        mine.folder / f"cache-{hashlib.blake2b(str(folder.absolute()).encode(), digest_size=8).hexdigest()}"
    )
    with _locked(mine.folder):
        if note.is_file():  # by an earlier dataset, or by another rank
            return Path(note.read_text())
        for number in count(1):
            candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            other = _claim(candidate, mine)
            if other is None:
                note.write_text(str(candidate))
                return candidate
            if given:
                raise UserError(
                    f"dataset: local '{folder}' is used by another job (process {other}), and jobs evict each other's "
                    "shards; give each its own"
                )
    raise AssertionError("unreachable")


def _claim(folder: Path, mine: Job) -> str | None:
    """Lock a cache for the job; or the process that has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file, host, started = folder / _CACHE_LOCK, socket.gethostname(), time.monotonic()
    lock = _open(file)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder, there, launch = (*file.read_text(errors="replace").split("\n"), "", "")[:3]
            waited = time.monotonic() - started
            # The same job on another machine, over a shared file system: they have always shared it.
            shares = mine.launch is not None and launch == mine.launch
            # What is left of a killed job, or somebody who is about to say who it is.
            going = there == host and not _lives(holder) and waited < _LINGER
            coming = (mine.launch is not None or not holder) and waited < _INTRODUCE
            if shares or not (going or coming):
                os.close(lock)
                return None if shares else holder or "unknown"
            time.sleep(0.05)
        except OSError:  # a file system without locks
            os.close(lock)
            return None
    os.truncate(lock, 0)
    os.write(lock, f"{mine.pid}\n{host}\n{mine.launch or ''}".encode())
    mine.held.append(lock)
    return None


def _lives(pid: str) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return True


def _clean(root: Path) -> None:
    """Remove names and folders of jobs of which no process lives. Call it with ``root`` locked."""
    for folder in root.iterdir():
        if not _TOKEN.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError):  # alive: BlockingIOError
            alive = _open(folder / _ALIVE)
            try:
                fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _unlink_segments(folder.name)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                _release(alive)


def _unlink_segments(token: str) -> None:
    from _posixshmem import shm_unlink

    from streaming.base.constant import SHM_TO_CLEAN

    if SEGMENTS.is_dir():
        names = [path.name for path in SEGMENTS.glob(f"{token}*_*")]
    else:  # macOS: no list, so all that are likely
        names = [f"{Prefix(number, token):06}_{what}" for number in range(64) for what in SHM_TO_CLEAN]
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            shm_unlink(f"/{name}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in a folder, for a moment."""
    lock = _open(folder / _BUSY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        _release(lock)


def _release(lock: int) -> None:
    """Unlock and close: a process that was forked meanwhile has the lock, too, and closing alone would leave it there."""
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def _open(file: Path) -> int:
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
