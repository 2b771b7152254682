"""A look at an opened dataset before the first step: what would otherwise end a run hours later, in one line each.

That the index can be read, its store reached, and that it was written with the hash that is to be checked, is known
once a stream is open (``data/streams.py``). Here: columns, hashes of every shard, files that are there and as
long as the index says (a folder's all, a store's first and last), and room for what will be cached.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
from streaming.base.distributed import get_local_rank, get_rank, get_world_size

from ..models.errors import UserError
from .messages import first_line, shown
from .object_store import object_bytes
from .patch_targets import COLUMN
from .remote import join_address
from .schema import COLUMNS

Answer = TypeVar("Answer")

TARGET_COLUMNS = {"id": "str", COLUMN: "bytes"}
"""Columns of stored targets that are a dataset of their own."""


def together(work: Callable[[], Answer]) -> Answer:
    """Do something on every rank; if one of them cannot, none goes on, and all say why.

    Raises:
        UserError: this rank's own, or the first of another one.
    """
    try:
        answer = work()
    except Exception as error:  # raised here and not later: kept in a variable, it would keep the dataset
        _tell(str(error) if isinstance(error, UserError) else first_line(error))
        raise
    others = [line for line in _tell(None) if line is not None]
    if others:
        raise UserError(others[0])
    return answer


def _tell(line: str | None) -> list[str | None]:
    """What every rank has to say."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        lines: list[str | None] = [None] * get_world_size()
        torch.distributed.all_gather_object(lines, line)
        return lines
    return [line]


def check_streams(
    streams: Sequence[Any], shards: Sequence[Sequence[Any]], cache_limit: int = 0, room: bool = True
) -> None:
    """Look at every stream of a dataset, and at the disk; every rank calls this.

    Rank 0 asks the stores; the first rank of each machine looks at its folders and its disk.

    Args:
        streams: opened ``data.streams.SafeStream``.
        shards: of each, its Streaming readers.
        cache_limit: most bytes of copies, as Streaming keeps to it; 0: no limit.
        room: all of it will be read, so refuse a disk that cannot hold it.

    Raises:
        UserError: the first thing that is wrong, with its address and what to do.
    """
    parts = [part for stream, own in zip(streams, shards, strict=True) for part in _parts(stream, own)]
    for stream, own, columns in parts:
        _check_columns(stream, own, columns)
        _check_hashes(stream, own)
        if stream.remote is None:
            if get_local_rank() == 0:
                _check_folder(stream, own)
        elif get_rank() == 0:
            _check_store(stream, own)
    if room and get_local_rank() == 0:
        _check_room([(stream, own) for stream, own, _ in parts if stream.remote is not None], cache_limit)


def _parts(stream: Any, shards: Sequence[Any]) -> list[tuple[Any, list[Any], dict[str, str]]]:
    """A stream with its shards and columns, and the stream of its stored targets, where it has one."""
    if stream.targets is None:
        return [(stream, list(shards), COLUMNS)]
    return [
        (stream, [shard.parts[0] for shard in shards], COLUMNS),
        (stream.targets, [shard.parts[1] for shard in shards], TARGET_COLUMNS),
    ]


def address_of(stream: Any, *names: str) -> str:
    """Where a stream, or a file of it, is: for people."""
    return shown(join_address(stream.remote or stream.local, stream.split, *names))


def _check_columns(stream: Any, shards: Sequence[Any], columns: dict[str, str]) -> None:
    for shard in shards:
        there: dict[str, str] = dict(
            zip(getattr(shard, "column_names", ()), getattr(shard, "column_encodings", ()), strict=True)
        )
        for name, encoding in columns.items():
            if there.get(name) != encoding:
                is_ = f"is '{there[name]}'" if name in there else "is not there"
                have = ", ".join(f"{n}: {e}" for n, e in there.items())
                raise UserError(
                    f"dataset: {address_of(stream)}: column '{name}' {is_} in {shard.raw_data.basename}, '{encoding}' is "
                    f"needed (it has {have}); write it with the columns of opsin.data.schema"
                )


def _check_hashes(stream: Any, shards: Sequence[Any]) -> None:
    """Streaming looks when a shard has come, and takes the first that lacks it for the epoch's end."""
    name = stream.validate_hash
    for shard in shards if name else ():
        info = shard.zip_data or shard.raw_data
        if name not in info.hashes:
            raise UserError(
                f"dataset: {address_of(stream)}: {info.basename} was not written with the hash '{name}', others "
                "were; set validate_hash: null, or write it anew"
            )


def _check_folder(stream: Any, shards: Sequence[Any]) -> None:
    folder = Path(stream.local) / stream.split
    for shard in shards:
        files = [info for info in (shard.raw_data, shard.zip_data) if info is not None]
        here = [info for info in files if (folder / info.basename).is_file()]
        if not here:
            raise UserError(
                f"dataset: {address_of(stream, shard.raw_data.basename)} is not there, the index names it; copy it "
                "again, or write the dataset anew"
            )
        for info in here:
            _check_size(
                address_of(stream, info.basename), (folder / info.basename).stat().st_size, info.bytes
            )


def _check_store(stream: Any, shards: Sequence[Any]) -> None:
    """The first shard and the last: an upload that broke off, or an index that was copied alone.

    Streaming can only download from other stores than S3; there the index was read, and the first samples will be.
    """
    for shard in [shards[0], *shards[1:][-1:]]:
        info = shard.zip_data or shard.raw_data
        address = join_address(stream.remote, stream.split, info.basename)
        if address.startswith("s3://"):
            try:
                size = object_bytes(address)
            except UserError as error:
                raise type(error)(f"dataset: {error}") from error
            if size is not None:
                _check_size(shown(address), size, info.bytes)


def _check_size(address: str, size: int, expected: int) -> None:
    if size != expected:
        raise UserError(
            f"dataset: {address} has {size:,} bytes, the index says {expected:,}; copy it again, or write the dataset anew"
        )


def _check_room(parts: Sequence[tuple[Any, Sequence[Any]]], cache_limit: int) -> None:
    """Refuse when a disk has no room for the copies that are still to come."""
    disks: dict[int, list[Any]] = {}
    for stream, shards in parts:
        folder = Path(stream.local) / stream.split
        disk = disks.setdefault(folder.stat().st_dev, [folder, 0, 0, []])
        for shard in shards:
            size = _cached_bytes(stream, shard)
            disk[1 + ((folder / shard.raw_data.basename).is_file())] += size
        disk[3].append(address_of(stream))
    for folder, missing, here, addresses in disks.values():
        coming = missing if not cache_limit else min(missing, max(0, cache_limit - here))
        free = shutil.disk_usage(folder).free
        if coming > free:
            raise UserError(
                f"dataset: {', '.join(addresses)}: {_size(coming)} are yet to be kept in {folder}, its disk has "
                f"{_size(free)} free; free some, set `local` to a folder on another disk, or cache_limit to less"
            )


def _cached_bytes(stream: Any, shard: Any) -> int:
    """Bytes of a shard's copy; compressed beside it only where that is kept."""
    kept = shard.zip_data.bytes if shard.zip_data is not None and stream.safe_keep_zip else 0
    return shard.raw_data.bytes + kept


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
