"""Runs of a study on this machine: side by side, what they share made once, and what is done left alone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...models.errors import UserError
from ..run_folder import RunFolder, write_atomically
from ..stages import Stage
from .runs import RECORD, Run

LOOK = 2.0
"""Seconds between two looks at whether a stage that others wait for is there."""

Told = Callable[[Run, dict[str, Any]], None]


@dataclass
class Planned:
    """A run with the stages that it is made of, and the hash under which its result counts.

    ``shares``: it takes stages from other runs (``reuse_stages``).
    """

    run: Run
    stages: list[Stage]
    identity: str
    shares: bool = True


@dataclass
class _Board:
    """Which run goes next; shared by the threads that drive the workers."""

    waiting: list[Planned]
    told: Told
    making: dict[str, Planned] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    looked: float = -LOOK
    broken: list[BaseException] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self) -> Planned | None:
        """The first run none of whose stages somebody else is making now; waits for one; None: there is none left."""
        with self.changed:
            while self.waiting:
                self._look()
                for planned in self.waiting:
                    shared = [s.identity for s in planned.stages if s.identity not in self.made]
                    if planned.shares and any(s in self.making for s in shared):
                        continue
                    self.waiting.remove(planned)
                    for one in shared:
                        self.making.setdefault(one, planned)
                    return planned
                self.changed.wait(LOOK)
            return None

    def _look(self) -> None:
        """A first stage is there for others while the run that made it goes on with its next one."""
        if time.monotonic() - self.looked < LOOK:  # whoever waits: one look for all
            return
        wanted = {s.identity for planned in self.waiting for s in planned.stages}
        for one in [one for one in self.making if one in wanted]:
            maker = self.making[one]
            if any(s.identity == one and made_by(maker.run, s) for s in maker.stages):
                self.made.add(one)
                del self.making[one]
        self.looked = time.monotonic()

    def give(self, planned: Planned, answer: dict[str, Any]) -> None:
        """A run ended; its stages are there for others, if it got so far."""
        with self.changed:
            try:
                self._give(planned, answer)
            finally:  # whatever went wrong here, nobody must wait for these stages
                for stage in planned.stages:
                    if self.making.get(stage.identity) is planned:
                        del self.making[stage.identity]
                self.changed.notify_all()

    def _give(self, planned: Planned, answer: dict[str, Any]) -> None:
        for stage in planned.stages:
            mine = self.making.get(stage.identity) is planned
            if mine and finished(planned.run, stage):
                self.made.add(stage.identity)
        self.told(planned.run, answer)


def finished(run: Run, stage: Stage) -> bool:
    """Whether a stage of a run is done, here or in another run of the study."""
    folder = RunFolder(run.root / "runs", run.name)
    return folder.finished(stage) is not None or folder.shared(stage) is not None


def made_by(run: Run, stage: Stage) -> bool:
    """Whether a stage is done in the run's own folder, as far as can be read now."""
    try:
        return RunFolder(run.root / "runs", run.name).finished(stage) is not None
    except (OSError, ValueError):  # it is being written
        return False


def done(planned: Planned) -> dict[str, Any] | None:
    """What is on record of a run.

    Raises:
        UserError: its folder holds the result of other settings or other questions.
    """
    record = planned.run.record()
    if record is not None and record["identity"] != planned.identity:
        raise UserError(
            f"{planned.run.folder}: holds the result of other settings, data or questions; choose another --out, or "
            "remove the folder to have it made anew"
        )
    return record


def execute(
    plans: Sequence[Planned], jobs: int, told: Told, environments: Sequence[Mapping[str, str]]
) -> None:
    """Train and evaluate runs, ``jobs`` at a time.

    Args:
        plans: those that are not done.
        jobs: processes.
        told: called with every run that ended and its record, one at a time.
        environments: of the processes in turn (which GPU, how many threads).
    """
    made = {s.identity for p in plans for s in p.stages if finished(p.run, s)}
    board = _Board(list(plans), told, made=made)
    threads = [
        threading.Thread(target=_drive, args=(board, environments[i % len(environments)]), daemon=True)
        for i in range(min(jobs, len(plans)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # an interrupt should be heard
            thread.join(0.5)
    if board.broken:
        raise board.broken[0]


def _drive(board: _Board, environment: Mapping[str, str]) -> None:
    """One worker process, and another where it died."""
    worker: _Worker | None = None
    try:
        while (planned := board.take()) is not None:
            try:
                if worker is not None and not worker.alive():
                    worker.close()
                    worker = None
                worker = worker or _Worker(environment)
                answer = worker.ask(planned)
                if answer["status"] == "done":
                    _record(planned, answer)
            except Exception as error:  # no process, no room on the disk, half an answer
                # Whatever it was, the run has failed and is given back: others wait for its stages.
                said = getattr(error, "strerror", None) or error
                answer = {"status": "failed", "why": f"{type(error).__name__}: {said}"}
            board.give(planned, answer)
    except BaseException as error:  # told to the thread that waits for all
        board.broken.append(error)
    finally:
        if worker is not None:
            worker.close()


def _record(planned: Planned, answer: dict[str, Any]) -> None:
    record = {"identity": planned.identity, **answer}
    planned.run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(planned.run.folder / RECORD, json.dumps(record, indent=1) + "\n")


class _Worker:
    """A process of :mod:`.worker`, its log beside the runs."""

    def __init__(self, environment: Mapping[str, str]):
        command = [sys.executable, "-m", f"{__package__}.worker"]
        self.log: IO[bytes] | None = None
        self.environment = {**os.environ, **environment}
        self.command = command
        self.process: subprocess.Popen | None = None

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process is not None and self.process.poll() is None

    def _start(self, log: Path) -> subprocess.Popen:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("ab")
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=self.environment,
        )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def ask(self, planned: Planned) -> dict[str, Any]:
        """Have a run done; how it ended."""
        run = planned.run
        log = run.root / "logs" / f"{os.getpid()}-{threading.get_ident()}.log"
        if self.process is None:
            self.process = self._start(log)
        task = {
            "name": run.name, "files": list(run.cell.files), "arguments": run.arguments,
            "evaluation": list(run.evaluation), "folder": str(run.folder),
        }  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            return {"status": "failed", "why": f"its process ended with {_ending(code)}; see {log}"}
        answer = json.loads(line)
        answer.pop("name", None)
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            if self.process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # it is dead, and a task was not taken
                    self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.process.stdout is not None:
                self.process.stdout.close()
        if self.log is not None:
            self.log.close()


def _ending(code: int) -> str:
    import signal

    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
