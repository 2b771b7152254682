"""``opsin data convert``: whatever lies on a disk, as a dataset; samples that cannot be taken go into quarantine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import UserError, nearest
from ..messages import shown
from ..write import TooManyBad, Written, write_dataset
from .fetch import Fetcher
from .hf import TableSource, hf_files
from .jsonl import JsonSource
from .llava import LlavaSource
from .rows import parse_columns
from .source import RowSource
from .tars import TarSource

FORMATS = ("auto", "llava", "hf", "webdataset", "jsonl")
QUARANTINE = "quarantine.jsonl"
"""File beside ``index.json`` that names each sample that was left out: its id, number and place, reason and detail."""


@dataclass(frozen=True)
class Opened:
    """A source that can be converted.

    Attributes:
        kind: its format, one of :data:`FORMATS`.
        source: its samples.
        job: what decides them.
    """

    kind: str
    source: LlavaSource | RowSource
    job: dict[str, Any]


def open_source(
    source: str,
    kind: str = "auto",
    *,
    images: str | None = None,
    columns: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    timeout: float = 20.0,
    retries: int = 2,
    private: bool = False,
    threads: int = 16,
) -> Opened:
    """Look at a source and read its index.

    Args:
        source: file or folder; of tars also a brace pattern (``data-{000..099}.tar``).
        kind: one of :data:`FORMATS`.
        images: folder where the paths of pictures begin; default: that of the source.
        columns: ``question=NAME,answer=NAME,image=NAME`` (see :data:`opsin.data.convert.rows.KNOWN`).
        split: of a Hugging Face data set in a folder.
        limit: take the first so many samples.
        timeout, retries, private, threads: see :class:`~opsin.data.convert.fetch.Fetcher`.

    Raises:
        UserError: nothing of this format is there, or it cannot be read.
    """
    if kind not in FORMATS:
        raise UserError(f"--format '{kind}': unknown{nearest(kind, FORMATS)}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1")
    kind = _guessed(source) if kind == "auto" else kind
    if split is not None and (kind != "hf" or Path(source).expanduser().is_file()):
        what = (
            "a single file has no splits"
            if kind == "hf"
            else f"only Hugging Face data sets have them, not {kind}"
        )
        raise UserError(f"--split '{split}': {what}")
    named = parse_columns(columns)
    folder = Path(source).expanduser()
    default = folder if folder.is_dir() else folder.parent
    where = Path(images).expanduser() if images is not None else default
    if images is not None and not where.is_dir():
        raise UserError(f"{images}: no folder of pictures")
    if kind == "llava":
        if named.named:
            raise UserError("--columns: LLaVA's JSON has its own keys; for other ones use --format jsonl")
        made = LlavaSource(source, where, limit=limit)
        return Opened(kind, made, made.job)
    fetcher = Fetcher(str(where.resolve()), timeout, retries, private, threads)
    rows: RowSource
    if kind == "hf":
        rows = TableSource(hf_files(source, split), named, fetcher, limit)
    elif kind == "webdataset":
        rows = TarSource(tar_files(source), named, fetcher, limit)
    else:
        rows = JsonSource(source, named, fetcher, limit)
    job = {"kind": kind, **rows.job, "columns": columns or "", "samples": len(rows)}
    return Opened(kind, rows, job)


def convert(
    out: str | Path,
    opened: Opened,
    *,
    max_bad: float = 0.05,
    workers: int = 0,
    size_limit: int = 1 << 26,
    progress: Callable[[int], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> Written:
    """Write a source as a dataset, or go on where an earlier process was killed.

    Args:
        out: new or empty folder, or a remote one; or what is left of the same call.
        opened: the source.
        max_bad: share of its samples that may go into quarantine.
        workers, size_limit, progress, resumed: see :func:`opsin.data.write.write_dataset`.

    Raises:
        UserError: too many samples are bad (then there is no index), or ``out`` holds something else.
    """
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad {max_bad:g}: a share, 0 to 1")
    total = len(opened.source)
    if not total:
        raise UserError(f"{shown(str(out))}: no sample to write: the source is empty")
    try:
        return write_dataset(
            out, opened.source, opened.job, size_limit=size_limit, workers=workers, skip_bad=True,
            most_bad=int(max_bad * total), skipped=QUARANTINE, progress=progress, resumed=resumed,
        )  # fmt: skip
    except TooManyBad as error:
        raise TooManyBad(
            f"{error} (--max-bad {max_bad:g} of {total}); mend them and remove {shown(str(out))}, or give the same command with a "
            "larger --max-bad"
        ) from error


def tar_files(source: str) -> list[Path]:
    """The tars of a folder, a brace pattern or a single name, in order.

    Raises:
        UserError: there are none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found: Sequence[Path] = sorted(path.glob("*.tar"))
        if not found:
            raise UserError(f"{source}: no .tar file in this folder")
        return list(found)
    files = [Path(name).expanduser() for name in _braces(source)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file")
    return files


def _braces(text: str) -> list[str]:
    """``a-{00..02}.tar`` and ``{a,b}.tar`` as webdataset reads them."""
    found = re.search(r"\{([^{}]*)\}", text)
    if found is None:
        return [text]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span is None:
        inner = found[1].split(",")
    else:
        if int(span[2]) - int(span[1]) > 1_000_000:
            raise UserError(f"{text}: more than a million files")
        inner = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)]
    return [name for piece in inner for name in _braces(text[: found.start()] + piece + text[found.end() :])]


def _guessed(source: str) -> str:
    """The format of a source by its names."""
    if re.search(r"\.tar$", source):
        return "webdataset"
    path = Path(source).expanduser()
    by_ending = {".parquet": "hf", ".arrow": "hf", ".json": "llava", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    if path.is_file() and path.suffix.lower() in by_ending:
        return by_ending[path.suffix.lower()]
    if path.is_dir():
        if any(path.glob("*.tar")):
            return "webdataset"
        marks = ("state.json", "dataset_dict.json")
        if any((path / mark).is_file() for mark in marks) or any(
            next(folder.glob(f"*.{ending}"), None)
            for folder in (path, path / "data")
            for ending in ("parquet", "arrow")
        ):
            return "hf"
    elif not path.exists():
        raise UserError(f"{source}: no such file or folder")
    raise UserError(f"{source}: of no format that is known by its name; say --format {'|'.join(FORMATS[1:])}")
