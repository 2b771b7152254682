"""What a loader's worker process is set up with before its first sample."""

from __future__ import annotations

import sys
from functools import partial
from multiprocessing import resource_sharer
from types import TracebackType
from typing import Any


def set_up_worker(worker: int) -> None:
    """``worker_init_fn`` of a DataLoader: the worker is silent about a main process that went away.

    Args:
        worker: its number, which torch gives; unused.
    """
    sys.excepthook = partial(_unless_the_client_left, sys.excepthook)


def _unless_the_client_left(
    before: Any, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """An ``excepthook`` that drops connection errors of the thread that hands over tensors.

    A worker gives the main process each tensor as a file descriptor, from a thread of multiprocessing that prints a
    traceback when the receiver is no longer there. The receiver is the main process alone, which tells for itself why
    it stopped (one of its workers was killed, an interrupt), or is dead: beside its one line the traceback says nothing.
    All else (too many open files, an error in any other place) goes to the hook that was there before.
    """
    if not (_client_left(error) and _in_handover(traceback)):
        before(kind, error, traceback)


def _client_left(error: BaseException) -> bool:
    # A message cut off in its middle is an OSError without a number.
    return isinstance(error, ConnectionError | EOFError) or (type(error) is OSError and error.errno is None)


def _in_handover(traceback: TracebackType | None) -> bool:
    serve = resource_sharer._ResourceSharer._serve.__code__  # type: ignore[attr-defined]
    return traceback is not None and traceback.tb_frame.f_code is serve
