"""A source of small samples, and processes that are killed while they write it."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.data.schema import pack_images
from opsin.data.source import BadSample
from opsin.data.write import write_dataset


@dataclass(frozen=True)
class Toy:
    """Samples of given sizes; some have no picture, some are bad, one fails."""

    sizes: tuple[int, ...]
    bad: tuple[int, ...] = ()
    fails: int = -1

    at_once = 4

    def __len__(self) -> int:
        return len(self.sizes)

    def records(self, first: int, end: int) -> Iterator[dict[str, Any] | BadSample]:
        for i in range(first, end):
            if i == self.fails:
                raise ZeroDivisionError("no such colour")
            if i in self.bad:
                yield BadSample(f"toy/{i}", i, "a.png", "missing picture", "no such file")
                continue
            picture = random.Random(i).randbytes(self.sizes[i])
            question = f"<image>\nWhat is it? Only once {i}." if i % 3 else f"Picture {i // 6}? What is it?"
            yield {
                "id": f"toy/{i}",
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": f"it {i}"}],
                "images": pack_images([picture] if i % 3 else []),
                "meta": {},
            }


def write_toy(out: Any, source: Toy, size_limit: int = 1500, **options: Any) -> Any:
    return write_dataset(
        str(out), source, {"kind": "toy", "samples": len(source)}, size_limit=size_limit, **options
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_a_process(work: Callable[[], None]) -> int:
    """Run in a forked process that leads a group of its own; its exit code."""
    child = multiprocessing.get_context("fork").Process(target=_alone, args=(work,))
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode


def _alone(work: Callable[[], None]) -> None:
    os.setsid()
    work()
    sys.stdout.flush()
    os._exit(0)  # nothing of what this process has from its parent is to end with it


def killed_at(event: int, below: Path, work: Callable[[], None], *, later: float = 0.0) -> bool:
    """Run in a process that SIGKILL ends before its ``event``-th change of files or connection; whether it came so far.

    ``later``: so many seconds after it, instead.
    """
    seen = 0

    def count(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in _CHANGES or (name == "open" and str(arguments[0]).startswith(str(below))):
            seen += 1
            if seen == event:
                kill = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
                threading.Timer(later, kill).start() if later else kill()

    def watched() -> None:
        sys.addaudithook(count)
        work()

    code = in_a_process(watched)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "socket.connect", "fcntl.flock"}
