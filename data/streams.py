"""One stream of a dataset: a folder or a URL, with the stored targets that belong to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streaming import Stream
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash

from ..models.errors import UserError, nearest
from .joined import join, prepare_joined, set_up_joined
from .messages import shown, unreadable
from .patch_targets import COLUMN, PatchTargetsInfo
from .reader import OpenReader
from .remote import (
    PART,
    Damaged,
    cached,
    is_final,
    join_address,
    read_description,
    remove_partial,
    shard_hash,
    why_not,
)
from .sentences import dataset_hash

IGNORE = "ignore"
"""In place of an address of stored targets: leave the dataset's own out."""


class SafeStream(Stream):
    """A stream whose bad shards never stay in the cache.

    Args:
        targets: the stream of its stored targets, when they are a dataset of their own (``data/joined.py``).
        kwargs: arguments of ``streaming.Stream``.
    """

    def __init__(self, *, targets: SafeStream | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.targets = targets
        self.targets_info: PatchTargetsInfo | None = None

    def apply_default(self, default: dict) -> None:
        """Fill in what was not given, for the stored targets too."""
        super().apply_default(default)
        if self.targets is not None:
            self.targets.apply_default({**default, "split": ""})

    def get_shards(self, world: Any, allow_unsafe_types: bool) -> list[Any]:
        """Shards of the samples, joined with those of their targets."""
        shards = [
            OpenReader.of(shard) if type(shard) is MDSReader else shard
            for shard in super().get_shards(world, allow_unsafe_types)
        ]
        if self.remote is None:
            for shard in shards:
                shard.evict = _keep
        if self.targets is None:
            return shards
        side = self.targets.get_shards(world, allow_unsafe_types)
        fetched = (self.remote is not None, self.targets.remote is not None)
        return join(shards, side, fetched, self.targets.remote or self.targets.local)

    set_up_parts = Stream.set_up_local
    prepare_part = Stream.prepare_shard

    def set_up_local(self, shards: Any, cache_usage_per_shard: Any) -> None:
        """Note which shards are here already."""
        if self.targets is None:
            super().set_up_local(shards, cache_usage_per_shard)
            if self.remote is None:  # no copies, so cache_limit is not about them: here, and of no size
                cache_usage_per_shard[:] = cache_usage_per_shard > 0
            else:
                remove_partial(Path(self.local) / self.split)
        else:
            set_up_joined(self, self.targets, shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Any) -> int:
        """Fetch a shard, with its targets."""
        if self.targets is None:
            return super().prepare_shard(shard)
        return prepare_joined(self, self.targets, shard)

    def _prepare_shard_part(self, raw_info: Any, zip_info: Any = None, compression: str | None = None) -> int:
        """A file of a shard, with one more try where it came damaged or its store failed.

        Raises:
            ShardUnreadable: with its address and the cause.
        """
        folder, stored = Path(self.local) / self.split, zip_info or raw_info
        address = shown(join_address(self.remote or self.local, self.split, stored.basename))
        if self.remote is None and not _is_here(folder, raw_info, zip_info):
            raise unreadable(address, "it is not there any more")
        for attempt in range(2):
            try:
                count = 0
                if self.remote is not None and not _is_here(folder, raw_info, zip_info):
                    self._fetch(stored)
                    count = stored.bytes
                return count + super()._prepare_shard_part(raw_info, zip_info, compression)
            except Exception as error:
                if self.remote is not None:
                    for info in (raw_info, zip_info):
                        if info is not None:
                            (folder / info.basename).unlink(missing_ok=True)
                            (folder / f"{info.basename}.tmp").unlink(missing_ok=True)
                if attempt or self.remote is None or is_final(error):
                    raise unreadable(address, why_not(address, error)) from error
        raise AssertionError("unreachable")

    def _fetch(self, info: Any) -> None:
        """Download a file; it has its name only when it is whole and right, whenever this process is killed."""
        file = Path(self.local) / self.split / info.basename
        partial = file.with_name(f"{file.name}.{os.getpid()}{PART}")
        partial.unlink(missing_ok=True)
        try:
            self._download_file(info.basename, partial.name)
            content = partial.read_bytes()
            if len(content) != info.bytes:
                raise Damaged(f"it has {len(content):,} bytes, the index says {info.bytes:,}")
            name = self.validate_hash
            if name and name in info.hashes and get_hash(name, content) != info.hashes[name]:
                raise Damaged(
                    f"its hash ({name}) is not that of the index; copy it again, or write the dataset anew"
                )
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def _is_here(folder: Path, raw_info: Any, zip_info: Any) -> bool:
    return any((folder / info.basename).is_file() for info in (raw_info, zip_info) if info is not None)


def _keep() -> int:
    """In place of a shard's ``evict`` where it is somebody's only file: Streaming 0.13.0 would delete it.

    It does so when another stream's shard needs room under ``cache_limit``.
    """
    return 0


def open_stream(name: str, options: Mapping[str, Any], validate_hash: str | None) -> SafeStream:
    """A stream of a dataset from its arguments in a configuration.

    Args:
        name: of the stream, for messages.
        options: ``remote`` (folder or URL), ``local``, ``split``, ``patch_targets`` and the like.
        validate_hash: see ``data.streaming.StreamingVLMDataset``.

    Raises:
        UserError: unknown key, nothing there, or stored targets of another dataset.
    """
    options = {k: v for k, v in options.items() if v is not None}
    given = options.get("local")
    known = (
        "remote",
        "local",
        "split",
        "proportion",
        "repeat",
        "choose",
        "download_retry",
        "download_timeout",
        "keep_zip",
        COLUMN,
    )
    for key in options:
        if key not in known:
            raise UserError(f"dataset.streams.{name}.{key}: unknown key{nearest(key, known)}")
    remote, targets = options.get("remote"), options.pop(COLUMN, None)
    if not remote:
        raise UserError(f"dataset.streams.{name}: needs remote: a folder or a URL")
    if "://" not in remote:
        index = Path(remote) / options.get("split", "") / "index.json"
        if not index.is_file():
            raise UserError(
                f"dataset: no MDS dataset at '{remote}' (no {index.name}); make one with `opsin data ...`"
            )
        options["local"] = options.pop("remote")
    else:
        options["local"] = str(cached(remote, options.get("split", ""), options.get("local")))
    algorithm = shard_hash(options, validate_hash)
    if targets is None or targets == IGNORE:
        return SafeStream(validate_hash=algorithm, **options)
    kept = {k: options[k] for k in ("download_retry", "download_timeout", "keep_zip") if k in options}
    if "://" in targets and given is not None:  # on the disk that was asked for
        kept["local"] = str(Path(given) / COLUMN)
    side = open_stream(name, {**kept, "remote": targets}, None if validate_hash is None else "auto")
    side.targets_info = read_description(side)
    index = Path(options["local"]) / options.get("split", "") / "index.json"
    if side.targets_info.dataset != dataset_hash(index.read_bytes()):
        raise UserError(
            f"dataset: {COLUMN} '{shown(targets)}' were made for another dataset than '{shown(remote)}' is now; make them anew with "
            f"`{side.targets_info.made_with} {shown(remote)} ... --sidecar`"
        )
    stream = SafeStream(validate_hash=algorithm, targets=side, **options)
    stream.targets_info = side.targets_info
    return stream


def addresses(named: Mapping[str, Mapping[str, Any]]) -> str:
    """Where several streams come from, for messages."""
    return ", ".join(shown(str(options.get("remote") or options.get("local"))) for options in named.values())
