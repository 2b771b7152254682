"""The samples of one side of a split for ViFT, made by number; workers import this and not what opens datasets."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ..schema import unpack_images
from ..source import BadSample, Record
from ..source import Text as SampleText
from .vift_rule import TEXT, Rule, caption_of, choose


class Samples(Protocol):
    """What is split: :class:`StoredSamples` or :class:`LlavaSource`. It is pickled once for each worker process."""

    digest: str

    def __len__(self) -> int: ...

    def texts(self) -> Iterable[SampleText | BadSample]:
        """All samples, without their pictures."""
        ...

    def records(self, first: int, end: int) -> Iterable[Record | BadSample]:
        """Samples ``first`` .. ``end`` - 1."""
        ...


@dataclass(frozen=True)
class SplitSource:
    """The samples of one side, made by number; see :func:`opsin.data.source.generate`."""

    samples: Samples
    numbers: array[int]
    side: str
    rule: Rule

    at_once = 16

    def __len__(self) -> int:
        return len(self.numbers)

    def records(self, first: int, end: int) -> Iterator[Record | BadSample]:
        """Samples ``first`` .. ``end`` - 1 of the side."""
        for number in self.numbers[first:end]:
            (record,) = self.samples.records(number, number + 1)
            if isinstance(record, BadSample) or self.side == TEXT:
                yield record
                continue
            pictures = len(unpack_images(record["images"]))
            text = SampleText(number, record["id"], record["conversations"], record["meta"], pictures)
            yield caption_of(record, choose(text, self.rule), self.rule)
