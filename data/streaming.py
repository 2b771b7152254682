"""Stored samples from local folders or object storage, on MosaicML Streaming, without its silent failures.

What Streaming 0.13.0 loses without a word or waits for, ``data/safe_dataset.py`` and ``data/streams.py`` see to.
And it repeats samples where ranks do not divide an epoch -> ``data/partition.py`` deals each exactly once; a
checkpoint made between two epochs begins the finished one again -> :meth:`StreamingVLMDataset.state_dict`. Weights of
streams that change while training -> ``data/mixture.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import algos
from streaming.base.util import number_abbrev_to_int

from ..models.errors import UserError, nearest
from .dataset_check import check_streams, together
from .messages import first_line
from .mixture import SCHEDULED, Mixture, refuse_large, resume_state, split_places
from .mixture_spec import check_weights, make_mixture, refuse_other_weights, take_kinds
from .partition import EXACT, FILLER, TAILS, places_a_rank
from .patch_targets import COLUMN, PatchTargetsInfo
from .remote import read_description, read_sentence_counts
from .safe_dataset import SafeDataset
from .schema import pack_images, stable_hash
from .sentences import SentenceCounts
from .shared_memory import private_names
from .streams import IGNORE, SafeStream, addresses, open_stream

__all__ = ["SafeStream", "StreamingVLMDataset"]


def filler(visit: int) -> dict[str, Any]:
    """What stands in a batch where an epoch has no sample left: all columns, and nothing in them."""
    sample = {"id": "", "conversations": [], "images": pack_images([]), "meta": {}, "stream": ""}
    return {**sample, "uid": 0, "visit": visit, "filler": True}


class StreamingVLMDataset(SafeDataset):
    """Samples of ``schema.COLUMNS`` from one or several named streams.

    Each sample also carries ``uid`` (stable, 1 .. 2**63 - 1), ``visit`` (how often it was served before),
    ``stream`` (name) and ``stream_id`` (its number), and ``patch_targets`` where they are stored; ``patch_targets_info`` says what they are.
    Several ranks get each sample exactly once an epoch; where their numbers do not come out even, some end on
    samples with ``filler: True`` (``uid`` 0, nothing in them), which the collator makes blank rows.

    Args:
        streams: name -> arguments of :class:`SafeStream` (``remote``, ``local``, ``proportion`` ...), ``kind``
            (``data.mixture_spec.KINDS``) and ``weight`` (a mixture that never changes); or a single remote under ``remote``.
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
        mixture: which share of each batch comes from which stream, and when that changes: see
            ``data.mixture_spec.make_mixture``. An epoch has ``epoch_size`` samples then, whole global batches; default:
            as many as all streams together hold.
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
        mixture: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        if tail not in TAILS:
            raise UserError(f"dataset: tail '{tail}': unknown{nearest(tail, TAILS)}")
        if bool(streams) == bool(remote):
            raise UserError("dataset: give either remote or streams")
        given: dict[str, Mapping[str, Any]] = dict(streams or {"default": {"remote": remote, "local": local}})
        if patch_targets is not None:
            if len(given) > 1 and patch_targets != IGNORE:
                raise UserError(
                    f"dataset: {COLUMN}: several streams each name their own: streams.NAME.{COLUMN}"
                )
            given = {name: {COLUMN: patch_targets, **options} for name, options in given.items()}
        named, self.stream_kinds, mixture = take_kinds(given, mixture)
        algorithm = kwargs.get("shuffle_algo")
        if algorithm is not None and algorithm not in algos:  # Streaming looks when an epoch starts
            raise UserError(f"dataset: shuffle_algo '{algorithm}': unknown{nearest(str(algorithm), algos)}")
        self._asked = {"streams": named, "batching_method": kwargs.get("batching_method", "random")}
        self.epoch_size_asked = kwargs.get("epoch_size")
        if mixture is not None:
            kwargs.pop("epoch_size", None)
            refuse_other_weights(named, self._asked)
        self.stream_names = list(named)
        opened = together(
            lambda: [open_stream(name, options, validate_hash) for name, options in named.items()]
        )
        private_names()
        try:
            super().__init__(streams=opened, batch_size=batch_size, **kwargs)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"dataset: {addresses(named)}: {first_line(error)}") from error
        self.tail = tail
        self.mixture: Mixture | None = None
        self.mixture_spec: dict[str, Any] | None = None
        self.samples_a_rank = self.length  # before it is filled up or cut
        if self.batching_method == "random" and mixture is None:
            self.batching_method = EXACT
            ranks = self._parallel_rank_world.num_ranks
            self.length = places_a_rank(self.epoch_size, ranks, batch_size, tail)
        self._epoch_now = 0
        self._visit_now: int | None = None
        self._visits = np.empty(0, np.int64)
        self._fillers = 0
        self._without = [options.get(COLUMN) == IGNORE for options in named.values()]
        try:
            if mixture is not None:
                self._mix(mixture, self.epoch_size_asked)
            self.patch_targets_info = together(lambda: self._check_and_describe(whole))
        except BaseException:
            self.__del__()  # whoever holds the error holds this, too, and the cache must be free for another try
            raise
        self._drop_clients()

    def __getitem__(self, at: Any) -> Any:
        """One stored sample, with ``uid``, ``visit`` and ``stream``; a list of them for a slice or a list of indices."""
        if isinstance(at, slice):
            at = range(*at.indices(self.size))
        if not isinstance(at, (int, np.integer)):
            return [self[int(i)] for i in at]
        if not -self.size <= at < self.size:
            raise IndexError(f"sample {at} of {self.size}")
        at = int(at) % self.size
        sample = super().__getitem__(at)
        shard, _ = self.spanner[at]
        stream = int(self.stream_per_shard[shard])
        name = self.stream_names[stream]
        if self._without[stream]:
            sample.pop(COLUMN, None)
        sample["uid"] = stable_hash("sample", name, sample["id"])
        sample["visit"] = self._epoch_now if self._visit_now is None else self._visit_now
        sample["stream"], sample["stream_id"] = name, stream
        return sample

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """This worker's share of an epoch.

        Raises:
            ShardUnreadable: as it says.
        """
        self._fillers = 0
        try:
            yield from super().__iter__()
        finally:
            self._visit_now = None
        for _ in range(self._fillers):
            yield filler(self._epoch_now)

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        for sample_id in super()._each_sample_id(it):
            if self.mixture is not None:
                self._visit_now = int(self._visits[it.yield_index])
            yield sample_id

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
        if self.mixture is not None:
            ids, self._visits = split_places(ids)
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
        mixed = {} if self.mixture is None else {"mixture": self.mixture.state()}
        return {**state, "epoch_size": self.epoch_size, **mixed}

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
        saved = obj.get("mixture")
        if (saved or {}).get("identity") != (self.mixture and self.mixture.identity) and (
            saved or obj["epoch"] or obj["sample_in_epoch"]
        ):
            raise UserError(
                "dataset: the checkpoint was made with another mixture (its streams or their sizes, its phases, epoch_size or "
                "global_train_batch_size differ), so what comes next is not known: bring it back, or start a new run from "
                "its weights (init_from)"
            )
        if self.mixture is not None and saved:
            self.mixture.load(saved)
        refuse_large(obj)
        # For workers of later epochs, too, whatever :meth:`set_mixture` has told them meanwhile.
        for name in ("num_canonical_nodes", "shuffle_seed", "initial_physical_nodes"):
            if obj.get(name) is not None:
                setattr(self, name, obj[name])
        super().load_state_dict(obj)

    @property
    def global_batch(self) -> int:
        """Samples of all ranks a step."""
        return int(self.batch_size or 0) * self._parallel_rank_world.num_ranks

    def use_mixture(self, spec: Mapping[str, Any], epoch_size: int | str | None = None) -> None:
        """Have another mixture, or one at all, from the first epoch on; call it alike on all ranks, before anything is read.

        Args:
            spec: as the argument ``mixture``.
            epoch_size: samples an epoch, whole global batches; default: as it was asked for, else as many as all streams
                together hold.

        Raises:
            UserError: as the constructor, or an epoch has begun.
        """
        if self.next_epoch > 0:
            raise UserError(
                "dataset: its mixture was to be replaced when an epoch had begun; see set_mixture"
            )
        refuse_other_weights(self._asked["streams"], self._asked)
        self._mix(spec, epoch_size if epoch_size is not None else self.epoch_size_asked)

    def set_mixture(self, weights: Mapping[str, float]) -> None:
        """Other weights from the next epoch on; call it alike on all ranks.

        The change is part of :meth:`state_dict`, and reaches persistent workers.

        Args:
            weights: of the streams by name; those that are not named get 0.

        Raises:
            UserError: the dataset has no mixture, or the weights make none.
        """
        if self.mixture is None:
            raise UserError("dataset: it has no mixture that could be changed; give it one (dataset.mixture)")
        weights = check_weights(weights, self.stream_names, "mixture")
        told = resume_state(self._shm_prefix_int)
        if told is not None and told["epoch"] >= self.next_epoch:  # loaded, and not begun: its place stays
            epoch = told["epoch"] + bool(told["sample_in_epoch"])
        else:
            # An epoch long over, which Streaming takes for an old state: it names no place to go on from.
            epoch, told = self.next_epoch, {**super().state_dict(0, True), "epoch": -2, "sample_in_epoch": 0}
        self.mixture.change(weights, epoch * self.mixture.epoch_batches)
        told = {**told, "mixture": self.mixture.state()}
        refuse_large(told)
        super().load_state_dict(told)

    def _mix(self, spec: Mapping[str, Any], epoch_size: int | str | None) -> None:
        """Let the streams be mixed by a schedule."""
        ranks, batch = self._parallel_rank_world.num_ranks, self.global_batch
        held = [int(size) for size in self.samples_per_stream]
        for name, each in zip(self.stream_names, held, strict=True):
            if not each:
                raise UserError(f"dataset.streams.{name}: it has no samples to mix; leave it out")
        try:
            size = (
                max(sum(held) // batch, 1) * batch if epoch_size is None else number_abbrev_to_int(epoch_size)
            )
        except ValueError as error:
            raise UserError(
                f"dataset: epoch_size {epoch_size}: use a number of samples, or 10k or 2m"
            ) from error
        if size < batch or size % batch:
            raise UserError(
                f"dataset: epoch_size {epoch_size}: a mixture needs whole global batches of {batch}; use "
                f"{max(round(size / batch), 1) * batch}"
            )
        self.mixture = make_mixture(spec, self.stream_names, held, batch, size)
        self.mixture_spec = dict(spec)
        self.batching_method, self.epoch_size = SCHEDULED, size
        self.length = self.samples_a_rank = size // ranks

    def _resume(self, world: Any, epoch: int) -> tuple[int, int]:
        if self.mixture is not None:
            self.mixture.load((resume_state(self._shm_prefix_int) or {}).get("mixture", {}))
        return super()._resume(world, epoch)

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
