"""Question files -> rows, by the ending of the file's name; pictures inside them are read later, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...data.messages import shown
from ...models.errors import UserError, nearest
from .addresses import local_file


class Row(dict[str, Any]):
    """A row of a question file: column -> value. A column of pictures holds a list of ``pictures.Stored``.

    Attributes:
        place: ``file:line`` or ``file: row n`` (from 1), for messages.
    """

    def __init__(self, values: dict[str, Any], place: str):
        super().__init__(values)
        self.place = place

    def column(self, *names: str) -> str:
        """The first of some names (files of one benchmark differ in theirs) that is a column.

        Raises:
            UserError: none is; the line names the nearest one.
        """
        for name in names:
            if name in self:
                return name
        hint = nearest(names[0], self) if len(self) < 40 else ""
        raise UserError(f"{self.place}: no column '{names[0]}'{hint}")

    def text(self, *names: str) -> str:
        """The text or number in a column.

        Raises:
            UserError: no such column, or nothing in it.
        """
        name = self.column(*names)
        text = self.optional(name)
        if not text:
            raise UserError(f"{self.place}: nothing in column '{name}'")
        return text

    def optional(self, *names: str) -> str:
        """The text or number in a column; empty where there is none.

        Raises:
            UserError: it is neither text nor a number.
        """
        value = next((self[name] for name in names if name in self), None)
        if value is None or value != value:  # NaN is how pandas writes nothing
            return ""
        if isinstance(value, float) and value.is_integer():  # and how it writes whole numbers beside it
            value = int(value)
        if not isinstance(value, str | int | float):
            found = type(value).__name__
            raise UserError(f"{self.place}: column '{names[0]}' is no text but a {found}")
        return str(value).strip()


def read_rows(address: str, pictures: Sequence[str] = ("image",)) -> Iterator[Row]:
    """Rows of a question file, local or remote, in its order.

    Args:
        address: path or URL; what the file is, its ending says: ``FORMS``.
        pictures: columns that hold pictures, where they are there.

    Raises:
        UserError: it cannot be read, or a row is not what its form wants; with file and line or row.
    """
    ending = Path(address).suffix.lower()
    if ending not in FORMS:
        raise UserError(f"{shown(address)}: '{ending}' is no form that can be read; use {', '.join(FORMS)}")
    path = local_file(address)
    try:
        yield from FORMS[ending](path, shown(address), tuple(pictures))
    except OSError as error:
        raise UserError(f"{shown(address)}: cannot be read ({error.strerror or error})") from error


def _json(path: Path, name: str, pictures: tuple[str, ...]) -> Iterator[Row]:
    from .json_rows import json_rows

    return json_rows(path, name, pictures)


def _tsv(path: Path, name: str, pictures: tuple[str, ...]) -> Iterator[Row]:
    from .tables import table_rows

    return table_rows(path, name, pictures, "\t")


def _csv(path: Path, name: str, pictures: tuple[str, ...]) -> Iterator[Row]:
    from .tables import table_rows

    return table_rows(path, name, pictures, ",")


def _parquet(path: Path, name: str, pictures: tuple[str, ...]) -> Iterator[Row]:
    from .parquet import parquet_rows

    return parquet_rows(path, name, pictures)


FORMS: dict[str, Callable[[Path, str, tuple[str, ...]], Iterator[Row]]] = {
    ".json": _json,
    ".jsonl": _json,
    ".tsv": _tsv,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Ending of a file's name -> its reader: JSON (a list, or an object a line), tables with a header, parquet."""
