"""Reading a stored sample with one system call instead of six.

Streaming 0.13.0 opens a shard's file for every sample, reads its place and then its bytes, and closes it. Here the last
shards stay open with their table of places in memory. Where files are evicted (``cache_limit``) they are opened each
time as before: an open file keeps its room on the disk.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.mds.encodings import _get_coder
from streaming.base.format.mds.reader import MDSReader

OPEN = 64
"""Most files that a process keeps open; shuffling mixes the samples of a few dozen shards at a time."""

_open: OrderedDict[str, _Shard] = OrderedDict()


class _Shard:
    """An open file and where its samples lie."""

    def __init__(self, path: str, samples: int):
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            table = os.pread(self.file, 4 * (samples + 1), 4)
            self.places: NDArray[np.uint32] = np.frombuffer(table, np.uint32)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self.file)


class OpenReader(MDSReader):
    """A shard whose file stays open for the next sample; what it yields is what ``MDSReader`` yields."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stays_open = True
        self._path = str(Path(self.dirname) / (self.split or "") / self.raw_data.basename)
        self._sizes = list(self.column_sizes)
        self._decode = [_get_coder(encoding).decode for encoding in self.column_encodings]  # type: ignore[union-attr]
        self.close()  # an earlier dataset's file of the same name may have been written anew

    @classmethod
    def of(cls, shard: MDSReader) -> OpenReader:
        """The same shard, read this way."""
        return cls(
            shard.dirname, shard.split, shard.column_encodings, shard.column_names, shard.column_sizes, shard.compression,
            shard.hashes, shard.raw_data, shard.samples, shard.size_limit, shard.zip_data,
        )  # fmt: skip

    def get_sample_data(self, idx: int) -> bytes:
        """The stored bytes of a sample.

        Raises:
            FileNotFoundError: the shard is not here (Streaming fetches it then).
            IndexError: it has no such sample, or not all of it.
        """
        if not self.stays_open:
            return super().get_sample_data(idx)
        shard = _open.get(self._path)
        if shard is None:
            shard = self._opened()
        else:
            _open.move_to_end(self._path)
        try:
            begin, end = shard.places[idx : idx + 2].tolist()
            data = os.pread(shard.file, end - begin, begin)
        except ValueError:  # the table is shorter
            begin, end, data = 0, 1, b""
        if not data or len(data) != end - begin:
            self.close()
            raise IndexError(f"sample {idx} is not present in the {self.raw_data.basename} file")
        return data

    def _opened(self) -> _Shard:
        shard = _open[self._path] = _Shard(self._path, self.samples)
        while len(_open) > OPEN:
            _open.popitem(last=False)[1].close()
        return shard

    def close(self) -> None:
        """Close the file, if it is open."""
        shard = _open.pop(self._path, None)
        if shard is not None:
            shard.close()

    def evict(self) -> int:
        """Delete the file; returns its bytes."""
        self.close()
        return super().evict()

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """A sample's columns from its stored bytes."""
        at, sizes = 0, []
        for size in self._sizes:
            if not size:
                size = int.from_bytes(data[at : at + 4], "little")
                at += 4
            sizes.append(size)
        sample = {}
        for name, decode, size in zip(self.column_names, self._decode, sizes, strict=True):
            sample[name] = decode(data[at : at + size])
            at += size
        return sample
