"""Where a benchmark's files are: here, or in object storage and then kept in the cache (``$OPSIN_CACHE``).

A question file that lies elsewhere is looked up each time it is read, and kept under its content: one that was written
anew is never mixed with what it was before. Pictures are kept under their folder's address and their name, and fetched
once. Streaming and boto3, which take seconds to import, are imported for addresses elsewhere only.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ...data.messages import shown
from ...data.schema import stable_hash
from ...models.errors import UserError
from ...models.packaged import cache_folder

if TYPE_CHECKING:
    from streaming.base.storage import CloudDownloader

FILE_SECONDS, PICTURE_SECONDS = 3600.0, 300.0
"""Most time for a question file, which may hold a benchmark's pictures, and for one picture."""


ENDINGS = (".json", ".jsonl", ".tsv", ".csv", ".parquet")
"""Of files that hold questions."""


_WHO = ("S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
"""Variables that a store's client is made with."""

_answered: set[tuple[str, ...]] = set()
"""Buckets, and as whom, that a file has come from."""


def is_remote(address: str) -> bool:
    """Whether an address is a URL (``s3://``, ``gs://`` ...)."""
    return "://" in address


def joined(folder: str, name: str) -> str:
    """Address of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder).expanduser() / name)


def folder_of(address: str) -> str:
    """Address of the folder that a file lies in."""
    return address.rpartition("/")[0] if is_remote(address) else str(Path(address).expanduser().parent)


def cached_folder(address: str) -> Path:
    """Where files of a remote folder, or versions of a remote file, are kept."""
    return cache_folder() / "benchmarks" / f"{stable_hash(address.rstrip('/')):016x}"


def question_files(address: str | Sequence[str], *sets: Sequence[str]) -> list[str]:
    """The question files at an address, or at several.

    Args:
        address: a file; or a folder, local or remote; or a list of them.
        sets: names of files that such a folder has, all of the first set or all of another one. A local folder that
            has none of them is read by its parquet files, in the order of their names.

    Returns:
        Addresses of files; for a remote folder those of the first set, which may turn out not to be there.

    Raises:
        UserError: there is no such file or folder, or it lacks files.
    """
    if not isinstance(address, str):
        return [file for one in address for file in question_files(one, *sets)]
    if is_remote(address):
        if not sets or Path(address).suffix.lower() in ENDINGS:
            return [address]
        return [joined(address, name) for name in sets[0]]
    path = Path(address).expanduser()
    if not path.is_dir():
        return [str(local_file(address))]
    for names in sets:
        missing = [name for name in names if not (path / name).is_file()]
        if not missing:
            return [str(path / name) for name in names]
        if len(missing) < len(names):
            raise UserError(
                f"{address}: has no {' and no '.join(missing)}; add it, or give the files you have by name"
            )
    found = [str(file) for file in sorted(path.glob("*.parquet")) if file.is_file()]
    if not found:
        wanted = [", ".join(names) for names in sets] + ["*.parquet"]
        raise UserError(
            f"{address}: has no {', nor '.join(wanted)}; give the file, or the folder that has it"
        )
    return found


def local_file(address: str) -> Path:
    """A file, here: as it lies, or fetched into the cache, whole or not at all.

    Raises:
        UserError: it is not there or cannot be read (``data.object_store.Unreachable``: from here, or as who we are).
    """
    if is_remote(address):
        return _fetched(address)
    path = Path(address).expanduser()
    try:
        if path.is_file():
            return path
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError as error:
        raise UserError(f"{address}: cannot be read ({error.strerror or error})") from error
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise UserError(f"{address}: {'is a folder' if path.is_dir() else 'no such file'}{hint}")


def _fetched(address: str) -> Path:
    """A remote file as it is now."""
    folder, name = cached_folder(address), address.rpartition("/")[2]
    with _alone(folder, address):
        version = _etag(address)
        if version is not None:
            kept = folder / f"{stable_hash(version):016x}" / name
            if not kept.is_file():
                download(address, kept, FILE_SECONDS)
            return kept
        fresh = folder / "fresh" / name
        download(address, fresh, FILE_SECONDS)
        with fresh.open("rb") as file:
            digest = hashlib.sha1()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        kept = folder / digest.hexdigest()[:16] / name
        kept.parent.mkdir(exist_ok=True)
        fresh.replace(kept)
        return kept


@contextlib.contextmanager
def _alone(folder: Path, address: str) -> Iterator[None]:
    """One process at a time: ranks of a machine want the same file at once."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(
            f"{shown(address)}: the cache {folder} cannot be written ({error.strerror})"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def _etag(address: str) -> str | None:
    """What an S3 store calls an object's present content; None where a store, or another kind of one, doesn't say."""
    if not address.startswith("s3://"):
        return None
    from boto3.session import Session
    from botocore.exceptions import BotoCoreError, ClientError

    from ...data.object_store import object_bytes

    if object_bytes(address) is None:  # and says why there is none
        return None
    bucket, _, key = address.removeprefix("s3://").partition("/")
    try:
        with contextlib.closing(
            Session().client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"))
        ) as client:
            return client.head_object(Bucket=bucket, Key=key).get("ETag")
    except (BotoCoreError, ClientError):
        return None


@lru_cache(8)
def _downloader(process: int, bucket: str, *who: str) -> CloudDownloader:
    """One for all files of a bucket: making a client takes longer than fetching a picture. Forks do not share theirs."""
    from streaming.base.storage import CloudDownloader

    return CloudDownloader.get(bucket)


def download(address: str, to: Path, seconds: float) -> None:
    """Fetch a remote file, whole or not at all, or say in a bounded time why not.

    Raises:
        UserError: it cannot be had.
    """
    from ...data.object_store import Unreachable, object_bytes
    from ...data.remote import PART, why_not, within

    store = ("/".join(address.split("/")[:3]), *(os.environ.get(name, "") for name in _WHO))
    if address.startswith("s3://") and store not in _answered:  # whose downloader would wait for minutes
        object_bytes(address)
    partial = to.with_name(f"{to.name}.{os.getpid()}-{threading.get_ident()}{PART}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        within(seconds, lambda: _downloader(os.getpid(), *store).download(address, str(partial)))
        partial.replace(to)
        _answered.add(store)
    except Exception as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        kind = UserError if isinstance(error, ValueError) else Unreachable  # no such kind of store
        why, place = why_not(address, error), shown(address)
        raise kind(why if why.startswith(place) else f"{place}: cannot be fetched: {why}") from error
