"""Samples as a dataset, in a folder or in object storage: the one way in which Opsin writes samples.

They are made by several processes and written by this one, in order, so that the shards depend neither on the
number of processes nor on how often they were killed. While a shard is uploaded the next one is made.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..models.errors import UserError
from .messages import first_line
from .schema import COLUMNS, unpack_images
from .sentences import SIDECAR, SentenceCounts, dataset_hash
from .shards import ShardWriter, encoder
from .source import BadSample, Record, Source, generate

SKIPPED = "skipped.jsonl"
"""File beside ``index.json`` that names the samples that were left out, and why."""


class TooManyBad(UserError):
    """More samples are bad than may be left out."""


@dataclass
class Written:
    """What :func:`write_dataset` did.

    Attributes:
        samples: number of samples in the dataset.
        counts: of the instruction sentences of its samples with pictures, as in ``sentences.json``.
        skipped: reason -> number of samples that were left out.
        left_out: their numbers, as the source gave them.
    """

    samples: int
    counts: SentenceCounts
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: list[int] = field(default_factory=list)


@dataclass
class _Shard:
    """Samples of the shard that is being filled."""

    size: int
    rows: list[bytes] = field(default_factory=list)
    counts: SentenceCounts = field(default_factory=SentenceCounts)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def add(self, record: Record, row: bytes, size: int) -> None:
        self.rows.append(row)
        self.size += size
        if unpack_images(record["images"]):
            self.counts.add(record["conversations"])

    def note(self, end: int) -> dict[str, Any]:
        """What another process needs: the first sample it has to make, and what the shards so far add up to."""
        c = self.counts
        return {
            "end": end,
            "counts": {"turns": c.turns, "words": c.words, "counts": c.counts},
            "skipped": self.skipped,
        }


def write_dataset(
    out: str | Path,
    source: Source,
    job: Mapping[str, Any],
    *,
    size_limit: int,
    workers: int = 0,
    skip_bad: bool = False,
    most_bad: int | None = None,
    skipped: str = SKIPPED,
    templates: Sequence[str] = (),
    files: Callable[[Written], Mapping[str, bytes]] | None = None,
    progress: Callable[[int], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> Written:
    """Write a source as a dataset, or go on where an earlier process was killed.

    Beside the shards lie ``sentences.json`` (how often each instruction sentence occurs in samples with pictures)
    and, where samples were left out, ``skipped.jsonl``. The index is written last.

    Args:
        out: new or empty folder, or a remote one; or what is left of the same job.
        source: the samples: one value for each of :data:`~opsin.data.schema.COLUMNS`.
        job: what decides the samples; a process goes on only with the same.
        size_limit: most bytes in a shard; a larger sample gets one of its own.
        workers: processes that make samples; 0: this one. They are spawned, so a script needs its ``__main__``
            guard.
        skip_bad: leave bad samples out; else the first one ends it.
        most_bad: one more than so many ends it all the same; what was left out until then is named in ``skipped`` in
            this machine's work folder (:func:`~opsin.data.unfinished.work_folder`).
        skipped: name of the file that names what was left out.
        templates: sentences that the dataset itself declares to be templates.
        files: further files to lie beside the index (name -> content), once the samples are written.
        progress: called with the number of the source's samples done so far: those of an earlier process, then
            after each one.
        resumed: called with the number of samples that are in the dataset already, if there are any.

    Raises:
        UserError: ``out`` holds something else or cannot be written, a sample is bad or cannot be made, or none
            is left. Shards that are finished stay, without an index, and the same call goes on.
    """
    from .. import __version__

    job = {**job, "size_limit": size_limit, "opsin": __version__}
    with closing(ShardWriter(str(out), job)) as writer:
        number = 0
        while number in writer.done:
            number += 1
        start = writer.noted(number - 1)["end"] if number else 0
        if number and resumed:
            resumed(sum(writer.done[i]["samples"] for i in range(number)))
        if number and not skip_bad:
            _refuse_skipped(writer, number)
        if start and progress:
            progress(start)
        limit = _Limit(writer, skip_bad, most_bad, skipped)
        for i in range(number):
            limit.noted(len(writer.noted(i)["skipped"]))
        limit.check([])
        _write_rest(writer, source, number, start, size_limit, workers, limit, progress)
        return _finish(writer, templates, files, skipped)


class _Limit:
    """How many bad samples may be left out."""

    def __init__(self, writer: ShardWriter, skip: bool, most: int | None, name: str):
        self.skip, self._writer, self._most, self._name, self._earlier = skip, writer, most, name, 0

    def check(self, bad: Sequence[dict[str, Any]]) -> None:
        """``bad``: those of the shard that is being filled.

        Raises:
            TooManyBad: they are too many, with those of the shards before it.
        """
        if self._most is None or self._earlier + len(bad) <= self._most:
            return
        self._writer.settle()
        done = range(len(self._writer.done))
        known = [each for i in done for each in self._writer.noted(i)["skipped"]]
        known += [each for each in bad if each["position"] not in {k["position"] for k in known}]
        file = self._writer.work / self._name
        file.write_text("".join(json.dumps(each) + "\n" for each in known))
        reasons = Counter(each["reason"] for each in known)
        raise TooManyBad(
            f"{self._writer.out}: more than {self._most} bad samples{_listed(reasons)}; they are named in {file}"
        )

    def noted(self, count: int) -> None:
        """A shard with so many samples left out is finished."""
        self._earlier += count


def _write_rest(
    writer: ShardWriter,
    source: Source,
    number: int,
    start: int,
    size_limit: int,
    workers: int,
    limit: _Limit,
    progress: Callable[[int], None] | None,
) -> None:
    """Write the samples from ``start`` on, as shards from ``number`` on."""
    with (
        tempfile.TemporaryDirectory(dir=writer.staging) as folder,
        closing(generate(source, start, workers)) as made,
    ):
        mds = encoder(COLUMNS, Path(folder), size_limit)
        shard = _Shard(mds.extra_bytes_per_shard)
        for position, record in enumerate(made, start):
            if isinstance(record, BadSample):
                if not limit.skip:
                    raise _bad(record)
                shard.skipped.append(asdict(record))
                limit.check(shard.skipped)
            else:
                try:
                    row = mds.encode_sample(record)
                except Exception as error:  # a column that is missing or of another type
                    raise UserError(f"sample {position} cannot be stored: {first_line(error)}") from error
                size = len(row) + mds.extra_bytes_per_sample
                if shard.rows and shard.size + size > size_limit:
                    writer.write(
                        number, COLUMNS, shard.rows, size_limit=size_limit, more=shard.note(position)
                    )
                    limit.noted(len(shard.skipped))
                    number, shard = number + 1, _Shard(mds.extra_bytes_per_shard)
                shard.add(record, row, size)
            if progress:
                progress(position + 1)
        if shard.rows:
            writer.write(number, COLUMNS, shard.rows, size_limit=size_limit, more=shard.note(len(source)))
        elif number and shard.skipped:  # all that was left has become bad since the last shard was noted
            last = writer.noted(number - 1)
            more = {"end": len(source), "skipped": last["skipped"] + shard.skipped}
            writer.note(number - 1, {**last, **more})
        elif not number:
            reasons = Counter(bad["reason"] for bad in shard.skipped)
            raise UserError(f"{writer.out}: no sample to write{_listed(reasons)}")


def _finish(
    writer: ShardWriter,
    templates: Sequence[str],
    more: Callable[[Written], Mapping[str, bytes]] | None,
    name: str,
) -> Written:
    index = writer.index()
    total = SentenceCounts(dataset=dataset_hash(index), templates=tuple(templates))
    skipped: list[dict[str, Any]] = []
    for number in range(len(writer.done)):
        noted = writer.noted(number)
        total.turns += noted["counts"]["turns"]
        total.words += noted["counts"]["words"]
        total.counts.update(noted["counts"]["counts"])
        skipped += noted["skipped"]
    files = {SIDECAR: total.dumps().encode()}
    if skipped:
        files[name] = "".join(json.dumps(bad) + "\n" for bad in skipped).encode()
    samples = sum(entry["samples"] for entry in writer.done.values())
    reasons, left_out = Counter(bad["reason"] for bad in skipped), [bad["position"] for bad in skipped]
    written = Written(samples, total, reasons, left_out)
    writer.finish({**files, **(more(written) if more else {})})
    return written


def _bad(sample: BadSample) -> UserError:
    return UserError(f"{sample}; mend it, or leave bad samples out with --skip-bad")


def _refuse_skipped(writer: ShardWriter, shards: int) -> None:
    """An earlier process left samples out; this one was not asked to."""
    for number in range(shards):
        for sample in writer.noted(number)["skipped"]:
            raise _bad(BadSample(**sample))


def _listed(reasons: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{n} {reason}' for reason, n in sorted(reasons.items()))})" if reasons else ""
