"""JSON lines (or a JSON list) of conversations whose pictures are paths or URLs, as a source of samples."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from .fetch import Fetcher
from .json_items import json_items
from .pictures import Unusable
from .rows import Columns, name_of
from .source import RowSource


class JsonSource(RowSource):
    """Samples of one file. The file is read once; workers get the places of its samples and read those.

    Args:
        file: one JSON object a line, or a list of them.
        columns: which key means what.
        fetcher: reads the pictures.
        limit: take the first so many.

    Raises:
        UserError: the file cannot be read, or is neither; its first object is no conversation by its keys.
    """

    kind = "jsonl"

    def __init__(self, file: str | Path, columns: Columns, fetcher: Fetcher, limit: int | None = None):
        super().__init__(columns, fetcher)
        self.file = Path(file).expanduser()
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        self._starts, self._ends = array("Q"), array("Q")
        names: list[str] = []
        for start, end, item in json_items(content, str(file)):
            if len(names) == limit:
                break
            if not names and isinstance(item, dict):
                try:
                    columns.wanted(item)
                except UserError as error:
                    raise UserError(f"{file}: {error}") from error
            self._starts.append(start)
            self._ends.append(end)
            names.append(name_of(item, columns) if isinstance(item, dict) else "")
        self.called(names)
        self.job = {"json": hashlib.sha1(content).hexdigest(), "folder": fetcher.folder}

    def rows(self, first: int, end: int) -> Iterator[tuple[str, str, Mapping[str, Any] | Unusable]]:
        """Objects ``first`` .. ``end`` - 1; a place is the file and the object's number, from 0."""
        with self.file.open("rb") as file:
            for position in range(first, end):
                file.seek(self._starts[position])
                item = json.loads(file.read(self._ends[position] - self._starts[position]))
                place = f"{self.file.name}#{position}"
                if isinstance(item, dict):
                    yield name_of(item, self.columns), place, item
                else:
                    fault = f"no JSON object but a {type(item).__name__}"
                    yield "", place, Unusable("conversation", fault)
