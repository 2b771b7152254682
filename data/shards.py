"""Whole MDS shards, one after the other: laid out by Streaming, uploaded and noted while the next one is made."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..models.errors import UserError
from .schema import HASHES
from .unfinished import Unfinished

AT_ONCE = 2
"""Most finished shards on this machine's disk while a remote dataset is written."""

_LARGEST = 2**32 - 1  # offsets inside a shard are uint32


class ShardWriter(Unfinished):
    """Writes whole shards of one dataset; each one is uploaded and noted while the next one is made.

    Arguments, attributes and errors are those of :class:`~opsin.data.unfinished.Unfinished`.
    """

    def __init__(self, out: str, job: Mapping[str, Any]):
        super().__init__(out, job)
        self._mover = ThreadPoolExecutor(1)  # one: shards are noted in their order
        self._moving: deque[Future[None]] = deque()
        self._failed = False

    def write(
        self,
        number: int,
        columns: Mapping[str, str],
        rows: Sequence[bytes],
        *,
        size_limit: int | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Write one shard of encoded rows and have it uploaded and noted.

        Args:
            number: of the shard.
            columns: name -> encoding.
            rows: at least one, as ``MDSWriter.encode_sample`` gives them.
            size_limit: the limit by which they were cut; it is stored in the shard.
            more: what is to be noted beside the shard.

        Raises:
            UserError: the shard is too large, or this or an earlier one cannot be written.
        """
        size = sum(map(len, rows)) + 4 * len(rows) + 65536
        if size > _LARGEST:
            raise UserError(
                f"shard {number} would have {size / 2**30:.1f} GiB, a shard holds less than 4; write the source with "
                "smaller shards"
            )
        while len(self._moving) >= AT_ONCE:
            self._moving.popleft().result()
        folder = self.staging / f"{number:05}"
        folder.mkdir()
        writer = encoder(columns, folder, size_limit)
        writer.shards = [{}] * number  # it numbers shards by those before
        writer.new_samples = list(rows)
        try:
            writer.flush_shard()
        except OSError as error:
            raise self.unwritable(error) from error
        finally:
            writer.executor.shutdown(wait=True)
        self._moving.append(self._mover.submit(self._move, number, folder, writer.shards[-1], more or {}))

    def _move(self, number: int, folder: Path, entry: dict[str, Any], more: Mapping[str, Any]) -> None:
        if self._failed:  # an earlier one was not written; notes have no gaps
            return
        try:
            self.put(folder / entry["raw_data"]["basename"])
            self.note(number, {"shard": entry, **more})
            folder.rmdir()
        except BaseException:
            self._failed = True
            raise

    def settle(self) -> None:
        """Wait until every shard so far is noted.

        Raises:
            UserError: one of them cannot be.
        """
        while self._moving:
            self._moving.popleft().result()

    def index(self) -> bytes:
        """The index of all shards, once they are written."""
        self.settle()
        shards = [self.done[number] for number in range(len(self.done))]
        return json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write files beside the index, then the index; forget the job."""
        super().finish({**files, "index.json": self.index()})

    def close(self) -> None:
        """Wait for what is being uploaded, and let another process go on."""
        self._mover.shutdown(wait=True)
        super().close()


def encoder(columns: Mapping[str, str], folder: Path, size_limit: int | None) -> Any:
    """Streaming's writer, which encodes rows and lays out shards."""
    from streaming import MDSWriter

    return MDSWriter(
        out=str(folder), columns=dict(columns), hashes=list(HASHES), compression=None, size_limit=size_limit
    )
