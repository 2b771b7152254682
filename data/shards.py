"""Writing samples as MDS shards: one way, for generated and for converted data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..models.errors import UserError
from .schema import COLUMNS, HASHES, unpack_images
from .sentences import SentenceCounts


def refuse_local(folder: Path) -> None:
    """Refuse to write where something is already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder; choose another one, or remove it")


def refuse_remote(out: str, local: str) -> Any:
    """Uploader from ``local`` to ``out``, after a look whether something is there already."""
    from streaming.base.storage.upload import CloudUploader

    try:
        uploader = CloudUploader.get((local, out), keep_local=True)
        there = uploader.list_objects()
    except NotImplementedError:  # some stores cannot list; then what is there is overwritten file by file
        return uploader
    except Exception as error:  # every store has its own errors
        raise UserError(
            f"{out}: cannot be reached ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    if there:
        raise UserError(f"{out}: not empty ({there[0]} ...); choose another folder, or remove it")
    return uploader


def write_shards(
    out: str,
    records: Iterator[dict[str, Any]],
    size_limit: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[SentenceCounts, bytes]:
    """Write records as MDS shards and count their instruction sentences on the way.

    Args:
        out: an empty or new folder, or a remote one.
        records: one value for each of :data:`~opsin.data.schema.COLUMNS`.
        size_limit: most bytes in a shard.
        progress: called after each record with the number written so far.

    Returns:
        Counts of the sentences of samples with pictures, and the bytes of the index that was written. When
        ``records`` fails half-way no index is written: half a dataset does not look like a whole one.
    """
    from streaming import MDSWriter

    counts = SentenceCounts()
    writer = MDSWriter(out=out, columns=COLUMNS, hashes=list(HASHES), compression=None, size_limit=size_limit)
    try:
        for done, record in enumerate(records, 1):
            writer.write(record)
            if unpack_images(record["images"]):
                counts.add(record["conversations"])
            if progress:
                progress(done)
    except BaseException:
        writer.cancel_future_jobs()  # leaving MDSWriter's own context would write the index of half a dataset
        if writer.remote:
            shutil.rmtree(writer.local, ignore_errors=True)
        raise
    writer.finish()
    # The index of a remote dataset is gone from this machine by now; these are its bytes.
    return counts, json.dumps({"version": 2, "shards": writer.shards}, sort_keys=True).encode()
