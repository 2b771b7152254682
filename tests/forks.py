"""Processes that cost no start: forked from one that has imported everything, once a session, at first use.

To import Composer, transformers and what belongs to them takes ten seconds of a core; a run of a dozen steps takes one.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TESTS = str(Path(__file__).parent)
PRELOADED = ["jobs", "methods", "opsin.training.cli", "opsin.training.train"]
_FIRST = dict(os.environ)
"""Before any test: what one test sets is not there in what is forked for another."""


def context() -> Any:
    """A multiprocessing context whose processes have imported everything."""
    from multiprocessing.forkserver import ensure_running

    made = mp.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    # The server imports by this path; Python 3.11 does not give it ours, and says nothing.
    path = os.pathsep.join([TESTS, *filter(None, [_FIRST.get("PYTHONPATH")])])
    given = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with _environment({**_FIRST, **given}):
        ensure_running()
    return made


class Command:
    """``opsin ARGUMENTS`` in a process of its own session, with the environment of whoever asks.

    Args:
        said: file for what it prints on both streams; none: one that is removed when it was killed.
        folder: that it works in.
        environment: beside what is there.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        said: Path | None = None,
        folder: Path | None = None,
        **environment: str,
    ):
        self._own = said is None
        if said is None:
            handle, name = tempfile.mkstemp(prefix="opsin-said-")
            os.close(handle)
            said = Path(name)
        self.said = said
        given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = context().Process(
            target=_run, args=(list(arguments), str(said), given, str(folder or Path.cwd()))
        )
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Its exit code; None: it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int | None:
        """Wait for its end."""
        self._process.join(timeout)
        return self.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # so young that it has no session yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL for all where it runs, and wait."""
        if self.poll() is None:
            self.signal(signal.SIGKILL)
            self.wait(30)
        if self._own:
            self.said.unlink(missing_ok=True)


def _run(arguments: list[str], said: str, environment: dict[str, str], folder: str) -> None:
    os.setsid()
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["opsin", *arguments]
    import torch

    from opsin.training import cli

    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # as in a process of its own
    try:
        cli.main()
    finally:  # multiprocessing ends its processes without
        atexit._run_exitfuncs()


@contextlib.contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def when(command: Command, ready: Callable[[], bool], seconds: float = 240) -> None:
    """Wait for something that a command does; it is an error when it ends before, or takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert command.poll() is None and time.monotonic() < deadline, command.said.read_text()[-3000:]
        time.sleep(0.01)
