"""Rows of CSV and TSV files with a header, quoted as spreadsheets and pandas do it."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ...data.messages import first_line
from ...models.errors import UserError
from .pictures import in_text
from .rows import Row

_BOM = b"\xef\xbb\xbf"


class _Lines:
    """Lines of a file as text, and the place behind the last one."""

    def __init__(self, file: BinaryIO, name: str):
        self.file, self.name = file, name
        self.end = self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.number += 1
        start = len(_BOM) if not self.end and line.startswith(_BOM) else 0
        self.end += len(line)
        try:
            return line[start:].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.name}:{self.number}: is no UTF-8 ({error.reason})") from error


def table_rows(path: Path, name: str, pictures: tuple[str, ...], delimiter: str) -> Iterator[Row]:
    """Rows of a table; of columns with pictures in base64, only where they stand in the file is kept.

    Args:
        path: the file.
        name: its name, for messages.
        pictures: columns that hold pictures: names, base64, or lists of them.
        delimiter: between values.

    Raises:
        UserError: no header, a column twice, a row with too many or too few values, a quote that is never closed.
    """
    csv.field_size_limit(sys.maxsize)  # of the process; a picture has millions of characters
    header: list[str] = []
    for first, start, end, values in _records(path, name, delimiter):
        if not header:
            header = [value.strip() for value in values]
            twice = [column for column in header if header.count(column) > 1]
            if twice:
                raise UserError(f"{name}:{first}: column '{twice[0]}' stands there twice")
            continue
        place = f"{name}:{first}"
        if len(values) != len(header):
            raise UserError(f"{place}: {len(values)} values under {len(header)} columns")
        row = Row(dict(zip(header, values, strict=True)), place)
        for column in pictures:
            if column in row:
                again = partial(_value, path, start, end, delimiter, header.index(column))
                row[column] = in_text(row[column], again, f"{place}: {column}")
        yield row
    if not header:
        raise UserError(f"{name}: is empty; its first line should name the columns")


def _records(path: Path, name: str, delimiter: str) -> Iterator[tuple[int, int, int, list[str]]]:
    """Records that are not blank: line that each starts in, place of its first byte, place behind it, values."""
    with path.open("rb") as file:
        lines = _Lines(file, name)
        reader = csv.reader(lines, delimiter=delimiter)
        first, start = 1, 0
        try:
            for values in reader:
                if values:
                    yield first, start, lines.end, values
                first, start, last = lines.number + 1, lines.end, (first, start)
        except csv.Error as error:
            raise UserError(f"{name}:{lines.number}: {error}") from error
    if lines.end:
        _refuse_open_quote(path, name, delimiter, *last)


def _refuse_open_quote(path: Path, name: str, delimiter: str, first: int, start: int) -> None:
    """A quote that is never closed takes all lines behind it into one value, without a word."""
    with path.open("rb") as file:
        file.seek(start)
        rest = io.BytesIO(file.read())
    try:
        list(csv.reader(_Lines(rest, name), delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end" in str(error):  # other things that ``strict`` minds are read as pandas reads them
            raise UserError(
                f"{name}:{first}: a quote is opened there and never closed ({first_line(error)})"
            ) from error


def _value(path: Path, start: int, end: int, delimiter: str, column: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        record = io.BytesIO(file.read(end - start))
    return next(csv.reader(_Lines(record, str(path)), delimiter=delimiter))[column]
