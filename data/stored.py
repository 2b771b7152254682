"""Samples of a dataset that exists, by number, in any process.

Streaming, which takes seconds to import, opens the dataset and fetches it; workers read the files without it.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from ..models.errors import UserError
from .cells import cells_of
from .messages import first_line, shown
from .schema import COLUMNS, unpack_images
from .sentences import dataset_hash
from .source import BadSample, Text

_DECODE: dict[str, Callable[[bytes], Any]] = {"str": bytes.decode, "json": json.loads, "bytes": bytes}
"""Streaming's encodings of our columns; an opened dataset has them, or it would have been refused."""


class StoredSamples:
    """Samples of one dataset in its order. Pickled, it is the folder of its shards: workers read the files.

    A remote dataset's shards are fetched by :meth:`texts`, in this process, and stay in its cache; call it before samples are
    made from them.

    Args:
        remote: folder or URL.

    Attributes:
        digest: hash of its index, which holds a hash of every shard.
        targets: whether it has stored ``patch_targets`` in it; they are not among what :meth:`records` gives.

    Raises:
        UserError: it cannot be read, or the disk has no room for its copy.
    """

    def __init__(self, remote: str):
        from .patch_targets import COLUMN
        from .streaming import StreamingVLMDataset

        # It is kept: while it lives no other job takes its cache, or evicts from it.
        self._dataset: Any = StreamingVLMDataset(
            remote=remote, batch_size=1, shuffle=False, patch_targets="ignore"
        )
        stream = self._dataset.streams[0]
        self.address, self._folder = shown(remote), Path(stream.local).absolute() / stream.split
        self.digest = dataset_hash((self._folder / "index.json").read_bytes())
        self._open()
        self.targets = any(COLUMN in shard.column_names for shard in self._shards)

    def _open(self) -> None:
        index = json.loads((self._folder / "index.json").read_bytes())
        self._shards = [SimpleNamespace(**shard) for shard in index["shards"]]
        self._starts = [0, *accumulate(shard.samples for shard in self._shards)]
        self._file: tuple[int, BinaryIO] | None = None

    def __getstate__(self) -> dict[str, Any]:
        kept = ("address", "digest", "targets", "_folder")
        return {name: value for name, value in vars(self).items() if name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._dataset = None
        self._open()

    def __len__(self) -> int:
        return self._starts[-1]

    def texts(self) -> Iterator[Text | BadSample]:
        """All samples without their pictures, which nobody looks at."""
        for number in range(len(self._shards)):
            try:
                self._dataset.prepare_shard(number)
            except UserError:
                raise
            except Exception as error:  # every store has its own errors
                raise UserError(
                    f"{self.address}: shard {number} could not be read: {first_line(error)}"
                ) from error
            for position in range(self._starts[number], self._starts[number + 1]):
                sample = self._sample(position)
                try:
                    pictures = len(unpack_images(sample["images"]))
                except ValueError as error:
                    yield BadSample(sample["id"], position, "", "pictures", first_line(error))
                    continue
                yield Text(position, sample["id"], sample["conversations"], sample["meta"], pictures)

    def records(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        """Samples ``first`` .. ``end`` - 1."""
        return (self._sample(position) for position in range(first, end))

    def _sample(self, position: int) -> dict[str, Any]:
        number = bisect_right(self._starts, position) - 1
        try:
            row = self._row(number, position - self._starts[number])
            cells = cells_of(self._shards[number], row)
            return {name: _DECODE[COLUMNS[name]](cells[name]) for name in COLUMNS}
        except Exception as error:  # a file that went away or is damaged
            raise UserError(
                f"{self.address}: sample {position} cannot be read: {first_line(error)}"
            ) from error

    def _row(self, number: int, place: int) -> bytes:
        """A stored row. The shard of the last one stays open."""
        if self._file is None or self._file[0] != number:
            if self._file is not None:
                self._file[1].close()
            shard = self._shards[number]
            self._file = number, (self._folder / shard.raw_data["basename"]).open("rb")
        file = self._file[1]
        file.seek(4 * (1 + place))
        begin, end = struct.unpack("<II", file.read(8))
        file.seek(begin)
        row = file.read(end - begin)
        if len(row) != end - begin:
            raise ValueError(f"{file.name} is shorter than it should be")
        return row
