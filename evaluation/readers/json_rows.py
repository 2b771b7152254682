"""Rows of a JSON list, or of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...data.convert.json_items import json_items
from ...models.errors import UserError
from .pictures import in_text
from .rows import Row


def json_rows(path: Path, name: str, pictures: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a file that is a list of objects, or has one a line.

    Args:
        path: the file.
        name: its name, for messages.
        pictures: columns that hold pictures: names, base64, or lists of them.

    Raises:
        UserError: it is no such file.
    """
    for number, (start, end, item) in enumerate(json_items(path.read_bytes(), name), 1):
        place = f"{name}: row {number}"
        if not isinstance(item, dict):
            raise UserError(f"{place}: no JSON object but a {type(item).__name__}")
        for column in pictures:
            if column in item:
                again = partial(_value, path, start, end, column)
                item[column] = in_text(item[column], again, f"{place}: {column}")
        yield Row(item, place)


def _value(path: Path, start: int, end: int, column: str) -> Any:
    with path.open("rb") as file:
        file.seek(start)
        return json.loads(file.read(end - start))[column]
