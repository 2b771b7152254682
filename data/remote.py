"""Datasets that lie elsewhere: their index, their sentence counts, and where their shards are kept here."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streaming import Stream
from streaming.base.storage import CloudDownloader

from ..models.errors import UserError, nearest
from ..models.packaged import cache_folder
from .messages import first_line, shown
from .object_store import Unreachable, object_bytes
from .patch_targets import DESCRIPTION, PatchTargetsInfo
from .schema import HASHES, stable_hash
from .sentences import SIDECAR, SentenceCounts, dataset_hash
from .shared_memory import own_cache

FETCH_SECONDS = 300.0
"""Most time for a small file of a dataset: its index, its counts."""

PART, OLD_SECONDS = ".part", 3600.0
"""Ending of what has not yet come as a whole, and after how long nobody waits for the rest of it."""


_WAITED = ("ReadTimeoutError", "RetriesExceededError")
"""What boto3 calls it when it has waited as long as it may."""


class Damaged(Exception):
    """A file came, and not as it was written."""


def cached(remote: str, split: str, local: str | None) -> Path:
    """Folder for a remote dataset's shards, with its index of now in it.

    By default it is named by address *and* index, so that data written anew under an old address is not mixed
    with its shards of before, whoever else reads those at the moment. No other job uses it at the same time.

    Raises:
        UserError: the index cannot be had, or ``local`` holds the shards of another dataset or is another job's.
    """
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary) / "index.json"
        fetch(remote, "index.json", fresh, split)
        content = fresh.read_bytes()
    written_hashes(content, join_address(remote, split, "index.json"))  # or it would stay in the cache
    if local:
        folder = Path(local)
        own_cache(folder / split, given=True)
    else:
        name = f"{stable_hash(remote, split, content):016x}"
        folder = own_cache(cache_folder() / "streams" / name, given=False)
    index = folder / split / "index.json"
    if not index.is_file():
        index.parent.mkdir(parents=True, exist_ok=True)
        partial = index.with_name(f"index.json.{os.getpid()}.part")
        partial.write_bytes(content)
        partial.replace(index)
    elif index.read_bytes() != content:
        raise UserError(
            f"dataset: local '{folder}' holds shards of another dataset than '{shown(remote)}' has now; remove it, or give "
            "another folder"
        )
    return folder


def shard_hash(options: Mapping[str, Any], validate_hash: str | None) -> str | None:
    """``auto``: the fastest hash that the dataset was written with; None where there is none."""
    split = options.get("split", "")
    index = Path(options["local"]) / split / "index.json"
    address = shown(join_address(options.get("remote") or options["local"], split))
    try:
        written = written_hashes(index.read_bytes(), str(index))
    except OSError as error:
        raise UserError(f"dataset: {index} cannot be read ({first_line(error)})") from error
    if validate_hash not in ("auto", None) and validate_hash not in written:
        raise UserError(
            f"dataset: validate_hash '{validate_hash}': {address} was not written with it"
            f"{nearest(validate_hash, written)}; auto takes the fastest that is there, null checks nothing"
        )
    if validate_hash != "auto":
        return validate_hash
    return next((h for h in reversed(HASHES) if h in written), next(iter(written), None))


def written_hashes(index: bytes, address: str) -> Mapping[str, str]:
    """The hashes that an index has of its first shard.

    Raises:
        UserError: it is no index.
    """
    try:
        hashes = json.loads(index)["shards"][0]["raw_data"]["hashes"]
        return dict(hashes)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"dataset: {shown(address)} is no index of MDS shards ({first_line(error)}); copy it again, or write the "
            "dataset anew"
        ) from error


def fetch(remote: str, name: str, to: Path, split: str = "") -> None:
    """Download one file of a dataset, whole or not at all, or say in a bounded time why not.

    Raises:
        Unreachable: its store does not answer, or wants other credentials.
        UserError: it cannot be had.
    """
    address = join_address(remote, split, name)
    if address.startswith("s3://"):
        try:
            object_bytes(address)
        except UserError as error:
            raise type(error)(f"dataset: cannot read {error}") from error
    partial = to.with_name(to.name + f".{os.getpid()}.part")
    try:
        within(FETCH_SECONDS, lambda: CloudDownloader.direct_download(address, str(partial)))
        partial.replace(to)
    except Exception as error:
        partial.unlink(missing_ok=True)
        kind = UserError if isinstance(error, ValueError) else Unreachable  # no such kind of store
        raise kind(f"dataset: cannot read {shown(address)}: {first_line(error)}") from error


def is_final(error: Exception) -> bool:
    """Whether it would be no use to try at once again: a full disk; a store that has let us wait for long."""
    return isinstance(error, OSError) or type(error).__name__ in _WAITED


def why_not(address: str, error: Exception) -> str:
    """Why a file could not be downloaded."""
    if isinstance(error, Damaged):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        kept = f" of {Path(error.filename).parent}" if error.filename else ""
        return f"no space left on the disk{kept}; free some, or set `local` to another one"
    if type(error).__name__ == "ClientError" and address.startswith(
        "s3://"
    ):  # Streaming says "not found" of any
        try:
            object_bytes(address)
        except UserError as told:
            return str(told)
    last = getattr(error, "last_exception", None) or error
    if type(last).__name__ == "ReadTimeoutError":  # its text names no endpoint
        return "its store let us wait for too long (ReadTimeoutError); is it overloaded?"
    return first_line(last)


def remove_partial(folder: Path) -> None:
    """Remove what killed jobs have not finished downloading; others may share the folder, so only what is old."""
    for file in folder.glob(f"*{PART}*"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > OLD_SECONDS:
                file.unlink()


def join_address(*parts: str) -> str:
    """A file's address from those of its folders; empty parts are left out."""
    return "/".join(part.strip("/") if i else part.rstrip("/") for i, part in enumerate(parts) if part)


def within(seconds: float, work: Callable[[], None]) -> None:
    """Do something that may never end, but wait no longer than this.

    Stores' own clients have time limits of their own, or none. What is given up goes on in a daemon thread, which
    ends with the process.

    Raises:
        TimeoutError: it has not ended.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer for {seconds:g} seconds")
    if failed:
        raise failed[0]


def read_sentence_counts(stream: Stream) -> SentenceCounts | None:
    """The sentence counts beside a stream's index; None if there are none.

    Raises:
        UserError: they are those of another dataset.
    """
    folder = Path(stream.local) / stream.split
    here = folder / SIDECAR
    if here.is_file():
        counts = SentenceCounts.load(here)
    elif stream.remote is None:
        return None
    else:
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary) / SIDECAR
            try:
                fetch(stream.remote, SIDECAR, copy, stream.split)
            except UserError:
                return None
            counts = SentenceCounts.load(copy)
    if counts.dataset and counts.dataset != dataset_hash((folder / "index.json").read_bytes()):
        address = shown(stream.remote or str(folder))
        raise UserError(
            f"dataset: {SIDECAR} of {address} was made for other shards; make it anew with `opsin data templates {address}`"
        )
    return counts


def read_description(stream: Stream) -> PatchTargetsInfo:
    """What the stored targets in a stream's shards are, from the file beside its index.

    Raises:
        UserError: there is no such file, or it is that of other shards.
    """
    folder, address = Path(stream.local) / stream.split, shown(stream.remote or stream.local)
    with tempfile.TemporaryDirectory() as temporary:
        file = folder / DESCRIPTION
        if stream.remote is not None:
            file = Path(temporary) / DESCRIPTION
            fetch(stream.remote, DESCRIPTION, file, stream.split)
        try:
            info = PatchTargetsInfo.load(file)
        except FileNotFoundError as error:
            raise UserError(
                f"dataset: no {DESCRIPTION} in '{address}'; make it with `opsin data latents`"
            ) from error
        except ValueError as error:
            raise UserError(f"dataset: {error}") from error
    if info.index != dataset_hash((folder / "index.json").read_bytes()):
        raise UserError(
            f"dataset: {DESCRIPTION} of {address} was made for other shards; make them anew with `{info.made_with}`"
        )
    return info
