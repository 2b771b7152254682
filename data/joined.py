"""Stored targets in a dataset of their own, read as if they were a column of the dataset they belong to.

Both have the same samples in the same shards, so shard ``i`` of one is joined to shard ``i`` of the other:
Streaming sees one shard whose two files are fetched, counted and evicted together, by its own locks, whatever
the order of samples, the number of workers or where a run resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streaming.base.format.base.reader import Reader

from ..models.errors import UserError
from .patch_targets import COLUMN, DESCRIPTION


class JoinedShard(Reader):
    """A shard of samples and the shard of their targets.

    Args:
        main: shard of the samples.
        side: shard of the targets.
        fetched: whether each is a copy that may be deleted, and not somebody's only file.
    """

    def __init__(self, main: Any, side: Any, fetched: tuple[bool, bool]):
        super().__init__(
            main.dirname, main.split, main.compression, main.hashes, main.samples, main.size_limit
        )
        self.file_pairs = main.file_pairs
        self.parts, self.fetched = (main, side), fetched

    def set_up_local(self, listing: set[str], safe_keep_zip: bool) -> int:
        """See :func:`set_up_joined`, which knows each part's folder."""
        raise NotImplementedError

    def get_raw_size(self) -> int:
        """Bytes of both."""
        return sum(part.get_raw_size() for part in self.parts)

    def get_zip_size(self) -> int | None:
        """Bytes of both when compressed."""
        return sum(part.get_zip_size() or 0 for part in self.parts) or None

    def evict(self) -> int:
        """Delete what was fetched; returns its bytes."""
        return sum(part.evict() for part, fetched in zip(self.parts, self.fetched, strict=True) if fetched)

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """The sample without its targets."""
        return self.parts[0].decode_sample(data)

    def get_sample_data(self, idx: int) -> bytes:
        """The bytes of the sample without its targets."""
        return self.parts[0].get_sample_data(idx)

    def get_item(self, idx: int) -> dict[str, Any]:
        """The sample with its targets.

        Raises:
            UserError: they are those of a sample with another id.
        """
        sample, targets = (part.get_item(idx) for part in self.parts)
        if sample["id"] != targets["id"]:
            raise UserError(
                f"dataset: {COLUMN} in {self.parts[1].dirname}: sample '{targets['id']}' stands where the dataset "
                f"has '{sample['id']}'; make them anew (the command stands in {DESCRIPTION})"
            )
        sample[COLUMN] = targets[COLUMN]
        return sample


def join(main: Sequence[Any], side: Sequence[Any], fetched: tuple[bool, bool], address: str) -> list[Any]:
    """Join a dataset's shards with those of its targets.

    Raises:
        UserError: they have other numbers of samples, or the dataset has targets of its own.
    """
    ours, theirs = ([len(shard) for shard in shards] for shards in (main, side))
    if ours != theirs:
        raise UserError(
            f"dataset: {COLUMN} '{address}': {sum(theirs)} samples in {len(theirs)} shards, the dataset has "
            f"{sum(ours)} in {len(ours)}; make them anew (the command stands in {DESCRIPTION})"
        )
    if any(COLUMN in shard.column_names for shard in main):
        raise UserError(
            f"dataset: {COLUMN} '{address}': the dataset has such a column already; leave one out"
        )
    return [JoinedShard(one, other, fetched) for one, other in zip(main, side, strict=True)]


def set_up_joined(stream: Any, side: Any, shards: Sequence[JoinedShard], usage: Any) -> None:
    """What is here already of joined shards: ``usage`` (bytes of copies) is 0 where a part is missing."""
    here = [[0] * len(shards), [0] * len(shards)]
    for which, owner in enumerate((stream, side)):
        owner.set_up_parts([shard.parts[which] for shard in shards], here[which])
    for i, shard in enumerate(shards):
        both = [part[i] for part in here]
        usage[i] = max(1, sum(b for b, f in zip(both, shard.fetched, strict=True) if f)) if all(both) else 0


def prepare_joined(stream: Any, side: Any, shard: JoinedShard) -> int:
    """Fetch what is missing of a joined shard; bytes of copies that were not counted so far."""
    total = 0
    for owner, part, fetched in zip((stream, side), shard.parts, shard.fetched, strict=True):
        raw = Path(part.dirname) / part.split / part.raw_data.basename
        # Half a joined shard counts as missing, so the half that lay here has not been counted either.
        known = part.raw_data.bytes if raw.is_file() else None
        delta = owner.prepare_part(part)
        total += (delta if known is None else known) if fetched else 0
    return total
