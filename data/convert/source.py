"""What the sources of ``opsin data convert`` share: rows become records, and what cannot be one is told with its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from ..schema import pack_images
from ..source import BadSample
from .fetch import Fetcher, place_of
from .ids import unique
from .pictures import Unusable
from .rows import Columns, Row, read_row


class RowSource(ABC):
    """Samples out of rows of somebody's data (a :class:`~opsin.data.source.Source`).

    A subclass sets ``names`` and ``job`` and gives rows. It is pickled once for each worker.

    Attributes:
        kind: its format.
        columns: which column means what.
        fetcher: reads pictures that a row only names.
        job: what decides the samples, for :func:`opsin.data.write.write_dataset`.
        renamed: position -> id, where it is not the row's own.
    """

    kind: str
    at_once = 32

    def __init__(self, columns: Columns, fetcher: Fetcher):
        self.columns, self.fetcher = columns, fetcher
        self.job: dict[str, Any] = {}
        self.renamed: dict[int, str] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def called(self, names: list[str]) -> None:
        """Take over the rows' ids (empty: none), one for each sample."""
        self._count, self.renamed = len(names), unique(names)

    @abstractmethod
    def rows(self, first: int, end: int) -> Iterator[tuple[str, str, Mapping[str, Any] | Unusable]]:
        """Rows ``first`` .. ``end`` - 1: id (empty: none), place, columns or what is wrong with it."""

    def records(self, first: int, end: int) -> Iterator[dict[str, Any] | BadSample]:
        """Samples ``first`` .. ``end`` - 1."""
        read = [(name, place, self._row(row)) for name, place, row in self.rows(first, end)]
        places = [p for _, _, row in read if isinstance(row, Row) for p in row.pictures]
        fetched = self.fetcher.fetch_all(places)
        for position, (name, place, row) in enumerate(read, first):
            if isinstance(row, Unusable):
                yield BadSample(name, position, place, *row.args)
                continue
            pictures = [next(fetched) for _ in row.pictures]
            bad = next((i for i, p in enumerate(pictures) if isinstance(p, Unusable)), None)
            if bad is not None:
                fault, at = pictures[bad], place_of(row.pictures[bad])
                assert isinstance(fault, Unusable)
                yield BadSample(name, position, f"{place}: {at}" if at else place, *fault.args)
                continue
            meta: dict[str, Any] = {"source": self.kind, "place": place}
            if named := [place_of(p) for p in row.pictures if place_of(p)]:
                meta["pictures"] = named
            if row.independent:
                meta["turns"] = "independent"
            yield {
                "id": self.renamed.get(position, name),
                "conversations": row.conversations,
                "images": pack_images([p for p in pictures if isinstance(p, bytes)]),
                "meta": meta,
            }

    def _row(self, row: Mapping[str, Any] | Unusable) -> Row | Unusable:
        if isinstance(row, Unusable):
            return row
        try:
            return read_row(row, self.columns)
        except Unusable as error:
            return error
