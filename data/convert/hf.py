"""Hugging Face data sets on disk (Parquet and Arrow files) as a source of samples; read by pyarrow, nothing else is needed."""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...models.errors import UserError, nearest
from ..messages import first_line
from .fetch import Fetcher
from .pictures import Unusable
from .rows import Columns, name_of
from .source import RowSource

_NUMBERED = re.compile(r"^(.+?)-\d{5}-of-\d{5}")
_KEYWORD = re.compile(r"(?:^|[-_. ])(train|test|validation|valid|val|dev|eval)(?:[-_. ]|$)")


class TableSource(RowSource):
    """Samples of Parquet or Arrow files, one after the other.

    Args:
        files: of equal columns, in order.
        columns: which column means what.
        fetcher: reads pictures that a row only names.
        limit: take the first so many.

    Raises:
        UserError: a file cannot be read, or no column makes a conversation.
    """

    kind = "hf"
    at_once = 64

    def __init__(self, files: Sequence[Path], columns: Columns, fetcher: Fetcher, limit: int | None = None):
        super().__init__(columns, fetcher)
        self.files = [str(file) for file in files]
        self._groups: list[tuple[int, int]] = []  # file, row group
        self._firsts = [0]  # first row of each, and the end
        self._file_starts: list[int] = []
        digest, names = hashlib.sha1(), list[str]()
        self._wanted: list[str] = []
        for number, file in enumerate(self.files):
            try:
                sizes, there, mark = _shape(file)
                self._wanted = self._wanted or columns.wanted(there)
                if missing := [name for name in self._wanted if name not in there]:
                    raise UserError(f"has no column '{missing[0]}', which the first file has")
                ids = _ids(file, [n for n in columns.names("id") if n in there][:1])
            except UserError as error:
                raise UserError(f"{file}: {error}") from error
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{file}: cannot be read ({first_line(error)})") from error
            digest.update(f"{Path(file).name} {mark}\n".encode())
            names += [name_of({"id": i}, Columns({"id": "id"})) for i in ids] if ids else [""] * sum(sizes)
            self._file_starts.append(self._firsts[-1])
            for group, rows in enumerate(sizes):
                if rows:
                    self._groups.append((number, group))
                    self._firsts.append(self._firsts[-1] + rows)
        self.called(names[:limit])
        self.job = {"files": digest.hexdigest(), "folder": fetcher.folder}

    def rows(self, first: int, end: int) -> Iterator[tuple[str, str, Mapping[str, Any] | Unusable]]:
        """Rows ``first`` .. ``end`` - 1; a place is the file and the number of its row, from 0."""
        while first < end:
            at = bisect.bisect_right(self._firsts, first) - 1
            number, group = self._groups[at]
            stop, offset = min(end, self._firsts[at + 1]), first - self._firsts[at]
            name = Path(self.files[number]).name
            before = self._firsts[at] - self._file_starts[number]  # rows of its file
            try:
                table = _group(self.files[number], group, tuple(self._wanted))
                found = table.slice(offset, stop - first).to_pylist()
            except (OSError, pa.ArrowException) as error:
                fault = Unusable("unreadable rows", f"cannot be read ({first_line(error)})")
                for i in range(first, stop):
                    yield "", f"{name}#{before + offset + i - first}", fault
            else:
                for i, row in enumerate(found):
                    yield name_of(row, self.columns), f"{name}#{before + offset + i}", row
            first = stop


def hf_files(source: str | Path, split: str | None = None) -> list[Path]:
    """The data files of a data set on disk, in order.

    Args:
        source: a ``.parquet`` or ``.arrow`` file; a folder of ``save_to_disk``; a folder of such files, as the hub
            has them (``train-00000-of-00002.parquet``, also in ``data/``).
        split: which of its splits; may be left out where there is one.

    Raises:
        UserError: no data set is there, or it has several splits, or not this one.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    splits = _saved_splits(path) or _named_splits(path)
    if not splits:
        inside = sorted(p.name for p in path.iterdir() if p.is_dir())[:8] if path.is_dir() else []
        hint = f"; name one of its folders: {', '.join(inside)}" if inside else ""
        raise UserError(f"{source}: no Parquet or Arrow file{hint}")
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split is None:
        raise UserError(f"{source}: has the splits {', '.join(splits)}; say which with --split")
    if split not in splits:
        raise UserError(f"{source}: --split '{split}': there is none{nearest(split, splits)}")
    return splits[split]


def _saved_splits(path: Path) -> dict[str, list[Path]]:
    """What ``save_to_disk`` wrote: split -> its files, as its ``state.json`` lists them."""
    folders = {"": path}
    listing = path / "dataset_dict.json"
    if listing.is_file():
        folders = {str(name): path / Path(str(name)).name for name in _read(listing).get("splits", [])}
    found = {}
    for name, folder in folders.items():
        if not (folder / "state.json").is_file():
            continue
        state = _read(folder / "state.json")
        if state.get("_indices_data_files"):
            raise UserError(f"{folder}: is a selection of other rows; save it after flatten_indices()")
        files = [folder / Path(str(f["filename"])).name for f in state.get("_data_files", [])]
        found[name or str(state.get("_split") or "train")] = files
    return found


def _named_splits(path: Path) -> dict[str, list[Path]]:
    """Split -> files of a folder, by the names that the hub gives them; all others are one split, as in ``datasets``."""
    found: dict[str, list[Path]] = {}
    for folder in (path, path / "data"):
        files = sorted(
            f for ending in ("parquet", "arrow") for f in folder.glob(f"*.{ending}") if f.is_file()
        )
        for file in files:
            name = _NUMBERED.match(file.stem) or _KEYWORD.search(file.stem)
            found.setdefault(name[1] if name else "train", []).append(file)
        if found:
            break
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    return content if isinstance(content, dict) else {}


def _shape(file: str) -> tuple[list[int], list[str], str]:
    """Rows of each group, names of the columns, and what tells this file from another of its name."""
    size = Path(file).stat().st_size
    with Path(file).open("rb") as raw:
        raw.seek(max(size - (1 << 16), 0))
        tail = hashlib.sha1(raw.read()).hexdigest()  # of Parquet it holds the footer: places and checksums
    if file.endswith(".parquet"):
        with pq.ParquetFile(file) as parquet:
            meta = parquet.metadata
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            names = parquet.schema_arrow.names
    else:
        table = _mapped(file)
        rows, names = [len(batch) for batch in table.to_batches()], table.schema.names
    return rows, list(names), f"{size} {sum(rows)} {tail}"


def _ids(file: str, column: list[str]) -> list[Any]:
    if not column:
        return []
    if file.endswith(".parquet"):
        with pq.ParquetFile(file) as parquet:
            return parquet.read(columns=column, use_threads=False)[column[0]].to_pylist()
    return _mapped(file)[column[0]].to_pylist()


@lru_cache(4)
def _mapped(file: str) -> Any:
    """An Arrow file's table, mapped and not read."""
    source = pa.memory_map(file)
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


@lru_cache(2)
def _group(file: str, group: int, columns: tuple[str, ...]) -> Any:
    """One row group of a file, with these columns; the last ones are kept, as a worker's ranges follow each other."""
    if file.endswith(".parquet"):
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            return parquet.read_row_group(group, columns=list(columns), use_threads=False)
    batch = _mapped(file).to_batches()[group]
    return pa.Table.from_batches([batch]).select(list(columns))
