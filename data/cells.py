"""A stored row of an MDS shard, cut into its columns' bytes and put together again without decoding them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any


def columns_of(shard: Any) -> dict[str, str]:
    """Columns of a shard: name -> encoding."""
    return dict(zip(shard.column_names, shard.column_encodings, strict=True))


def cells_of(shard: Any, row: bytes) -> dict[str, bytes]:
    """A stored row, cut into its columns' bytes as they are."""
    at, sizes = 0, []
    for size in shard.column_sizes:
        if not size:
            (size,) = struct.unpack_from("<I", row, at)
            at += 4
        sizes.append(size)
    cells = {}
    for name, size in zip(shard.column_names, sizes, strict=True):
        cells[name] = row[at : at + size]
        at += size
    return cells


def row_of(cells: Mapping[str, bytes], fixed: Sequence[str]) -> bytes:
    """Undo :func:`cells_of`; ``fixed``: columns whose encoding has one size, which is not stored."""
    names = sorted(cells)
    head = b"".join(struct.pack("<I", len(cells[name])) for name in names if name not in fixed)
    return head + b"".join(cells[name] for name in names)
