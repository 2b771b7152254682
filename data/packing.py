"""Packing: several documents in one row, so that fewer padding tokens are computed."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign documents to rows: longest first, each into the first row with room.

    A classic bin-packing heuristic (at most 11/9 of the optimum + 1 rows). Deterministic: equal lengths keep
    their order, rows are listed by their first document, documents in a row by their place in the batch.

    Args:
        lengths: tokens of each document; none may exceed ``capacity``.
        capacity: tokens a row.

    Returns:
        rows as lists of document indices.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        if length > capacity:
            raise ValueError(f"document {document} has {length} tokens, a row holds {capacity}")
        row = next((r for r, free in enumerate(room) if free >= length), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(document)
        room[row] -= length
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])
