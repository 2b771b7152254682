"""Rows of parquet files; pictures are read one group of rows at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...data.messages import first_line
from ...models.errors import UserError
from .pictures import Stored, checked, in_text
from .rows import Row

KEPT = 2
"""Groups of rows whose pictures are kept in memory."""


def parquet_rows(path: Path, name: str, pictures: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a file, without the values of columns that hold bytes.

    Args:
        path: the file.
        name: its name, for messages.
        pictures: columns that hold pictures: bytes, ``{bytes, path}`` as Hugging Face datasets writes them, names or
            base64, or lists of them. Other columns with bytes are left out.

    Raises:
        UserError: it is no parquet file.
    """
    try:
        yield from _ParquetPictures(path, name).rows(pictures)
    except pa.ArrowException as error:
        raise UserError(f"{name}: cannot be read as parquet ({first_line(error)})") from error


class _ParquetPictures:
    """A file and the groups of rows whose pictures were asked for last."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self._kept: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def rows(self, pictures: tuple[str, ...]) -> Iterator[Row]:
        with pq.ParquetFile(self.path) as file:
            schema = file.schema_arrow
            here = [column for column in pictures if column in schema.names]
            plain = [f.name for f in schema if f.name not in here and not _has_bytes(f.type)]
            number = 0
            for group in range(file.num_row_groups):
                columns = {column: self._shapes(file, group, column) for column in here}
                for at, values in enumerate(file.read_row_group(group, columns=plain).to_pylist()):
                    number += 1
                    place = f"{self.name}: row {number}"
                    for column, shapes in columns.items():
                        values[column] = self._stored(shapes[at], group, at, column, f"{place}: {column}")
                    yield Row(values, place)

    def _shapes(self, file: pq.ParquetFile, group: int, column: str) -> list[Any]:
        """What a column has in each row of a group: names as they are, ``True`` for each picture of its own."""
        kind = file.schema_arrow.field(column).type
        if not _has_bytes(kind):
            return file.read_row_group(group, columns=[column])[column].to_pylist()
        meta = file.metadata.row_group(group)
        parts = [meta.column(i) for i in range(meta.num_columns)]
        leaves = {part.path_in_schema: part for part in parts if part.path_in_schema.split(".")[0] == column}
        filled = [
            path
            for path, part in leaves.items()
            if path.split(".")[-1] != "path" and part.statistics and part.statistics.null_count == 0
        ]
        if filled == [column]:
            return [True] * meta.num_rows
        paths = [path for path in leaves if path.split(".")[-1] == "path"]
        if filled and paths:  # no row lacks its bytes, so how many there are is read off a small column
            found = file.read_row_group(group, columns=paths)[column].to_pylist()
            return [[True] * len(one) if isinstance(one, list) else True for one in found]
        return [_shape(one) for one in file.read_row_group(group, columns=[column])[column].to_pylist()]

    def _stored(self, shape: Any, group: int, at: int, column: str, where: str) -> list[Stored]:
        if isinstance(shape, list) and any(not isinstance(one, str) for one in shape):
            return [
                one if isinstance(one, str) else partial(self._picture, group, at, column, i, where)
                for i, one in enumerate(shape)
                if one is not None
            ]
        if shape is True:
            return [partial(self._picture, group, at, column, None, where)]
        return in_text(shape, partial(self._value, group, at, column), where)

    def _picture(self, group: int, at: int, column: str, which: int | None, where: str) -> bytes:
        value = self._value(group, at, column)
        if which is not None:
            value = value[which]
        return checked(value["bytes"] if isinstance(value, dict) else value, where)

    def _value(self, group: int, at: int, column: str) -> Any:
        with self._lock:
            key = (group, column)
            if key not in self._kept:
                try:
                    with pq.ParquetFile(self.path) as file:
                        self._kept[key] = file.read_row_group(group, columns=[column])[column]
                except (pa.ArrowException, OSError) as error:
                    raise UserError(f"{self.name}: {column} cannot be read ({first_line(error)})") from error
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key][at].as_py()


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _has_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _shape(value: Any) -> Any:
    """``True`` for bytes, the name where there are none, in the same lists."""
    if isinstance(value, list):
        return [_shape(one) for one in value]
    if isinstance(value, dict):
        return True if value.get("bytes") else value.get("path")
    return True if value else None
