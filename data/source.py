"""Data as samples with numbers: made by several processes, handed on in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol

from ..models.errors import UserError
from .messages import first_line

Record = dict[str, Any]
"""One value for each column of a dataset."""

_AHEAD = 4  # ranges in flight a worker: enough to keep it busy, few enough to stay small in memory


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be written.

    Attributes:
        id: its name; empty if it has none.
        position: its number in the source, from 0.
        file: the file that is wrong, as the source names it; empty: the sample itself is.
        reason: kind of fault, one of a few words that can be counted.
        detail: what is wrong, in one line.
    """

    id: str
    position: int
    file: str
    reason: str
    detail: str

    def __str__(self) -> str:
        name = f" (id {_quoted(self.id)})" if self.id else ""
        file = f"{_quoted(self.file)}: " if self.file else ""
        return f"sample {self.position}{name}: {file}{self.detail}"


@dataclass(frozen=True)
class Text:
    """What can be known of a sample without its pictures' bytes.

    Attributes:
        position: its number in the source, from 0.
        id, conversations, meta: columns of :data:`~opsin.data.schema.COLUMNS`.
        pictures: how many it has.
    """

    position: int
    id: str
    conversations: Any
    meta: Any
    pictures: int


def _quoted(text: str) -> str:
    """A name from a file of somebody's: on one line, and no longer than a line."""
    return repr(text if len(text) <= 100 else f"{text[:97]}...")


class Source(Protocol):
    """Samples 0 .. ``len`` - 1. It is pickled once for each worker process, so it should be small.

    Attributes:
        at_once: samples that a worker makes at a time.
    """

    at_once: int

    def __len__(self) -> int: ...

    def records(self, first: int, end: int) -> Iterable[Record | BadSample]:
        """Samples ``first`` .. ``end`` - 1, one value each; the same in every process and at any time."""
        ...


def generate(source: Source, first: int = 0, workers: int = 0) -> Generator[Record | BadSample, None, None]:
    """Samples from ``first`` on, in order, made here or by ``workers`` processes.

    The processes are spawned, so a script needs its ``__main__`` guard. They end with this one, however it ends.

    Raises:
        UserError: a sample cannot be made, or a worker was killed.
    """
    step = source.at_once
    ranges = [(at, min(at + step, len(source))) for at in range(first, len(source), step)]
    if workers <= 0 or not ranges:
        for each in ranges:
            yield from _made(source, *each)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(ranges)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(source,),
    )
    flying: deque[Future[list[Record | BadSample]]] = deque()
    try:
        for each in ranges:
            flying.append(pool.submit(_work, *each))
            if len(flying) > workers * _AHEAD:
                yield from flying.popleft().result()
        while flying:
            yield from flying.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that makes samples was killed (out of memory?); the same command goes on, with fewer workers if "
            "need be"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _made(source: Source, first: int, end: int) -> Iterator[Record | BadSample]:
    """A range of a source, every failure told in one line."""
    position = first
    try:
        for record in source.records(first, end):
            yield record
            position += 1
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # a source reads files, decodes and draws: it may fail in many ways
        raise UserError(f"sample {position} cannot be made: {first_line(error)}") from error
    if position != end:
        raise RuntimeError(f"{type(source).__name__}: {position - first} samples of {first} .. {end - 1}")


_source: Source | None = None  # of a worker process


def _begin(source: Source) -> None:
    global _source
    _source = source
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process that waits for work would not notice that nobody is left to give it any."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(first: int, end: int) -> list[Record | BadSample]:
    assert _source is not None
    return list(_made(_source, first, end))
