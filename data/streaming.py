"""Stored samples from local folders or object storage, on MosaicML Streaming, without its silent failures.

Streaming 0.13.0 is the right engine and has four holes through which a run loses data without a word or waits
for ever. :class:`SafeStream` and :class:`StreamingVLMDataset` close them:

* the parent's S3 client is shared by forked workers, which then read each other's bytes -> every process
  drops it and makes its own;
* a shard that cannot be read ends the epoch early, without an error -> the error is raised;
* ... and lets all other workers wait for ever -> the shard's state is reset, and who waits has the error too;
* a shard that failed its checksum stays in the cache and is trusted by the next run -> it has its name only when
  it was found right, and is fetched once more.

And it repeats samples where ranks do not divide an epoch -> ``data/partition.py`` deals each exactly once; a
checkpoint made between two epochs begins the finished one again -> :meth:`StreamingVLMDataset.state_dict`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.shuffle import algos
from torch.utils.data import get_worker_info

from ..models.errors import UserError, nearest
from .dataset_check import address_of, check_streams, together
from .messages import ShardUnreadable, first_line, unreadable
from .partition import EXACT, FILLER, TAILS, places_a_rank
from .patch_targets import COLUMN, PatchTargetsInfo
from .remote import join_address, read_description, read_sentence_counts
from .schema import pack_images, stable_hash
from .sentences import SentenceCounts
from .shared_memory import private_names
from .streams import IGNORE, SafeStream, addresses, open_stream

__all__ = ["SafeStream", "StreamingVLMDataset"]


def filler(visit: int) -> dict[str, Any]:
    """What stands in a batch where an epoch has no sample left: all columns, and nothing in them."""
    sample = {"id": "", "conversations": [], "images": pack_images([]), "meta": {}, "stream": ""}
    return {**sample, "uid": 0, "visit": visit, "filler": True}


class StreamingVLMDataset(StreamingDataset):
    """Samples of ``schema.COLUMNS`` from one or several named streams.

    Each sample also carries ``uid`` (stable, 1 .. 2**63 - 1), ``visit`` (how often it was served before) and
    ``stream`` (name), and ``patch_targets`` where they are stored; ``patch_targets_info`` says what they are.
    Several ranks get each sample exactly once an epoch; where their numbers do not come out even, some end on
    samples with ``filler: True`` (``uid`` 0, nothing in them), which the collator makes blank rows.

    Args:
        streams: name -> arguments of :class:`SafeStream` (``remote``, ``local``, ``proportion`` ...), or a
            single remote under ``remote``.
        remote: folder or URL (``s3://``, ``gs://``, ``azure://``, ``oci://``) of a single stream.
        local: where its shards are cached; default: beside the other caches of this user, by remote. A
            remote that is a local folder is read in place.
        batch_size: samples a device batch (Streaming deals samples to ranks by it).
        validate_hash: hash checked for every downloaded shard; ``auto``: the fastest that was written.
        patch_targets: for ``remote``: folder or URL of its stored targets, where they are a dataset of their own
            (``opsin data latents --sidecar``); streams name theirs under the same key. ``ignore``: leave a
            dataset's own column out.
        whole: all of it will be read in time: refuse a disk that cannot hold it.
        tail: what becomes of the samples at an epoch's end that make no whole global batch:
            ``data.partition.TAILS``.
        kwargs: further arguments of ``streaming.StreamingDataset``.

    Raises:
        UserError: on all ranks: it cannot be read, in one line with its address and what to do
            (``data/dataset_check.py``).
    """

    def __init__(
        self,
        *,
        streams: Mapping[str, Mapping[str, Any]] | None = None,
        remote: str | None = None,
        local: str | None = None,
        batch_size: int,
        validate_hash: str | None = "auto",
        patch_targets: str | None = None,
        whole: bool = True,
        tail: str = "share",
        **kwargs: Any,
    ):
        if tail not in TAILS:
            raise UserError(f"dataset: tail '{tail}': unknown{nearest(tail, TAILS)}")
        if bool(streams) == bool(remote):
            raise UserError("dataset: give either remote or streams")
        named: dict[str, Mapping[str, Any]] = dict(streams or {"default": {"remote": remote, "local": local}})
        if patch_targets is not None:
            if len(named) > 1 and patch_targets != IGNORE:
                raise UserError(
                    f"dataset: {COLUMN}: several streams each name their own: streams.NAME.{COLUMN}"
                )
            named = {name: {COLUMN: patch_targets, **options} for name, options in named.items()}
        algorithm = kwargs.get("shuffle_algo")
        if algorithm is not None and algorithm not in algos:  # Streaming looks when an epoch starts
            raise UserError(f"dataset: shuffle_algo '{algorithm}': unknown{nearest(str(algorithm), algos)}")
        self.stream_names = list(named)
        self._opened = together(
            lambda: [open_stream(name, options, validate_hash) for name, options in named.items()]
        )
        private_names()
        try:
            super().__init__(streams=self._opened, batch_size=batch_size, **kwargs)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"dataset: {addresses(named)}: {first_line(error)}") from error
        self.tail = tail
        self.samples_a_rank = self.length  # before it is filled up or cut
        if self.batching_method == "random":
            self.batching_method = EXACT
            ranks = self._parallel_rank_world.num_ranks
            self.length = places_a_rank(self.epoch_size, ranks, batch_size, tail)
        self._epoch_now = 0
        self._fillers = 0
        self._failure: BaseException | None = None
        self._began = float("inf")
        self._without = [options.get(COLUMN) == IGNORE for options in named.values()]
        try:
            self.patch_targets_info = together(lambda: self._check_and_describe(whole))
        except BaseException:
            self.__del__()  # whoever holds the error holds this, too, and the cache must be free for another try
            raise
        self._drop_clients()

    def __getitem__(self, at: int) -> dict[str, Any]:
        """One stored sample, with ``uid``, ``visit`` and ``stream``."""
        sample = super().__getitem__(at)
        shard, _ = self.spanner[at]
        stream = int(self.stream_per_shard[shard])
        name = self.stream_names[stream]
        if self._without[stream]:
            sample.pop(COLUMN, None)
        sample["uid"] = stable_hash("sample", name, sample["id"])
        sample["visit"] = self._epoch_now
        sample["stream"] = name
        return sample

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
        self._failure, self._fillers, self._began = None, 0, time.time()
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
        for _ in range(self._fillers):
            yield filler(self._epoch_now)

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

    def sentence_counts(self, sample: int = 0) -> SentenceCounts | None:
        """Instruction-sentence counts of all streams together, from the files beside their indexes.

        Args:
            sample: where a stream has no such file, count this many of its samples (spread evenly); 0: don't.

        Returns:
            None if some stream has no counts and ``sample`` is 0.
        """
        total = SentenceCounts()
        for i, stream in enumerate(self.streams):
            counts = read_sentence_counts(stream)
            if counts is None and sample:
                counts = self._sampled_counts(i, sample)
            if counts is None:
                return None
            total = total + counts
        return total

    def _sampled_counts(self, stream: int, count: int) -> SentenceCounts:
        first, size = int(self.sample_offset_per_stream[stream]), int(self.samples_per_stream[stream])
        counts = SentenceCounts()
        count = min(count, size)
        for i in range(count):
            sample = self[first + i * size // count]
            if any("<image>" in t.get("value", "") for t in sample["conversations"]):
                counts.add(sample["conversations"])
        return counts

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """This worker's sample ids. Its fillers, which come last, are counted and taken out (upstream skips -1)."""
        ids = super()._get_work(epoch, sample_in_epoch)
        fillers = ids == FILLER
        self._fillers = int(fillers.sum())
        ids[fillers] = -1
        return ids

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where the data stands, for a checkpoint.

        Composer makes a checkpoint of a finished epoch when it has already set its count of samples to 0.
        Streaming then names the finished epoch and its beginning, and a resumed run would do it again.

        Args:
            num_samples: places of the epoch that were trained on, over all ranks.
            from_beginning: counted from the epoch's beginning (Composer), not from this run's.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)
        return {**state, "epoch_size": self.epoch_size}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            UserError: in mid-epoch, over other data: no order would serve each sample once.
        """
        before = obj.get("epoch_size", self.epoch_size)
        if obj["sample_in_epoch"] and before != self.epoch_size:
            raise UserError(
                f"dataset: the checkpoint stands {obj['sample_in_epoch']} samples into an epoch of {before}, and the data "
                f"now has {self.epoch_size}: bring the data back, or start a new run from its weights (init_from)"
            )
        super().load_state_dict(obj)

    def _resume_incr_epoch(self) -> tuple[int, int]:
        epoch, sample = super()._resume_incr_epoch()
        self._epoch_now = int(epoch)
        return epoch, sample

    def _check_and_describe(self, whole: bool) -> PatchTargetsInfo | None:
        starts = [int(start) for start in self.shard_offset_per_stream]
        shards = [self.shards[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        check_streams(self._opened, shards, int(self.cache_limit or 0), room=whole)
        return self._describe()

    def _describe(self) -> PatchTargetsInfo | None:
        """What the stored targets of all streams are; None where there are none.

        Raises:
            UserError: nothing says what they are, or streams have targets of different kinds.
        """
        found: list[tuple[str, PatchTargetsInfo]] = []
        for i, (name, stream) in enumerate(zip(self.stream_names, self._opened, strict=True)):
            info = stream.targets_info
            first = self.shards[int(self.shard_offset_per_stream[i])]
            if info is None and not self._without[i] and COLUMN in getattr(first, "column_names", ()):
                info = read_description(stream)
            if info is not None:
                found.append((name, info))
        for name, info in found[1:]:
            if info.kind != found[0][1].kind:
                raise UserError(
                    f"dataset: streams '{found[0][0]}' and '{name}' have stored {COLUMN} of different kinds: "
                    f"{found[0][1].kind} and {info.kind}"
                )
        return found[0][1] if found else None

    def _drop_clients(self) -> None:
        """Close connections to object storage: sockets must not be shared by forked processes."""
        for stream in [*self._opened, *(s.targets for s in self._opened if s.targets is not None)]:
            downloader = getattr(stream, "_downloader", None)
            if downloader is not None:
                downloader.clean_up()
