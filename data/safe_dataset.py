"""Streaming's dataset without its silent failures: what is served is right and all of it, or there is an error.

Streaming 0.13.0 is the right engine and has four holes through which a run loses data without a word or waits
for ever. :class:`SafeDataset` and :class:`~opsin.data.streams.SafeStream` close them:

* the parent's S3 client is shared by forked workers, which then read each other's bytes -> every process
  drops it and makes its own;
* a shard that cannot be read ends the epoch early, without an error -> the error is raised;
* ... and lets all other workers wait for ever -> the shard's state is reset, and who waits has the error too;
* a shard that failed its checksum stays in the cache and is trusted by the next run -> it has its name only when
  it was found right, and is fetched once more.

Each has a test that fails on the stock class (``tests/data/test_faults.py``), so that we notice when it is mended.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from torch.utils.data import get_worker_info

from ..models.errors import UserError
from .dataset_check import address_of
from .messages import ShardUnreadable, first_line, unreadable
from .remote import join_address
from .streams import SafeStream


class SafeDataset(StreamingDataset):
    """A ``StreamingDataset`` of :class:`SafeStream`; each epoch is whole, or ends with the error's one line.

    Args:
        streams: opened; see ``data.streams.open_stream``.
        kwargs: further arguments of ``streaming.StreamingDataset``.
    """

    def __init__(self, *, streams: Sequence[SafeStream], **kwargs: Any):
        self._opened = list(streams)
        self._failure: BaseException | None = None
        self._began = float("inf")
        super().__init__(streams=self._opened, **kwargs)
        parts = [getattr(shard, "parts", (shard,)) for shard in self.shards]
        self._plain = [all(part.compression is None for part in each) for each in parts]
        for each in parts if self.cache_limit else ():
            for part in each:
                part.stays_open = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This worker's share of an epoch.

        Raises:
            ShardUnreadable: as it says (stock Streaming ends the epoch here).
        """
        if get_worker_info() is not None:
            self._drop_clients()
        if (
            hasattr(self, "_event") and self._event.is_set()
        ):  # its threads are dead: upstream may wait for them
            raise self._told(self._failure)
        self._failure, self._began = None, time.time()
        finished = False
        try:
            yield from super().__iter__()
            finished = True
        except UserError:
            raise
        except Exception as error:  # upstream's "background thread failed" is no reason
            raise self._told(self._failure or error) from error
        finally:
            if not finished and hasattr(self, "_iterator"):
                self._iterator.non_blocking_exit()
        if self._failure is not None or self._event.is_set():
            raise self._told(self._failure) from self._failure

    def _told(self, error: BaseException | None) -> UserError:
        return error if isinstance(error, UserError) else unreadable("", first_line(error))

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """One stored sample; where its bytes make none, that is an error with the shard's file.

        Raises:
            ShardUnreadable: no such file, or it holds something else than the index says.
        """
        try:
            return super().get_item(sample_id, retry)
        except UserError:
            raise
        except Exception as error:
            if self._failure is not None:
                raise self._told(self._failure) from error
            shard_id, _ = self.spanner[sample_id]
            stream, shard = self.streams[self.stream_per_shard[shard_id]], self.shards[shard_id]
            file = join_address(stream.local, stream.split, shard.file_pairs[0][0].basename)
            copy = "" if stream.remote is None else f" (a copy of what is in {address_of(stream)}; remove it)"
            raise unreadable(file, f"{file}{copy}: {first_line(error)}") from error

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard; if that fails, other workers say so too, instead of waiting for ever."""
        # Threads that read ahead ask for every sample; upstream takes the file lock of all processes each time. Nothing is
        # lost by a look without it: whoever does not find the file asks with ``blocking``, and it is fetched again.
        # (A compressed shard is LOCAL, too, where it has yet to be unpacked.)
        if not blocking and self._plain[shard_id] and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._shard_access_times[shard_id] = time.time_ns()
            return
        note = Path(f"{self._cache_filelock_path}-unreadable-{shard_id}")
        if self._shard_states[shard_id] == _ShardState.REMOTE:
            with contextlib.suppress(OSError):  # none
                if (
                    note.stat().st_mtime > self._began
                ):  # another worker has just tried, for as long as is allowed
                    raise ShardUnreadable(note.read_text())
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException as error:
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                if isinstance(error, ShardUnreadable):
                    with contextlib.suppress(OSError):
                        partial = note.with_name(f"{note.name}-{os.getpid()}")
                        partial.write_text(str(error))
                        partial.replace(note)
                self._shard_states[shard_id] = _ShardState.REMOTE
            raise
        limit = int(self.cache_limit or 0)
        if limit and self.cache_usage > limit:
            # Processes that fetch at once each look for room before any of them has taken it.
            with self._cache_filelock:
                while self.cache_usage > limit:
                    self._evict_coldest_shard()

    def _prepare_thread(self, it: _Iterator) -> None:
        """Upstream's, which says that it has ended only if it had no error; the next epoch waits for that."""
        try:
            super()._prepare_thread(it)
        except BaseException:
            it.on_exit()
            raise

    def _ready_thread(self, it: _Iterator) -> None:
        """Upstream's, which waits without a limit for a shard that another process fetches, even at exit.

        A shard that another process had begun, and that is remote again, failed there: it is asked for here, so that
        this process ends with the error too (a DataLoader shows errors in the order of its workers, and would wait
        for this one first).
        """
        try:
            while not it.should_exit() and it.ready_index < it.total and not self._event.is_set():
                sample_id = it.sample_ids[it.ready_index]
                if self.predownload is not None and self.predownload < it.ready_index - it.yield_index:
                    time.sleep(TICK)
                    continue
                if sample_id != -1:
                    shard_id = int(self.spanner[sample_id][0])
                    state = self._shard_states[shard_id]
                    if state == _ShardState.REMOTE:  # evicted, or as above
                        self.prepare_shard(shard_id, blocking=False)
                    if state != _ShardState.LOCAL:
                        time.sleep(TICK)
                        continue
                it.ready_index += 1
        finally:
            it.on_exit()

    def on_exception(self, future: Any) -> None:
        """Keep a background thread's error for :meth:`__iter__`, which raises it (upstream's is only logged)."""
        if future.exception():
            self._failure = self._failure or future.exception()
            self._event.set()

    def _drop_clients(self) -> None:
        """Close connections to object storage: sockets must not be shared by forked processes."""
        for stream in [*self._opened, *(s.targets for s in self._opened if s.targets is not None)]:
            downloader = getattr(stream, "_downloader", None)
            if downloader is not None:
                downloader.clean_up()
