"""Trials: a job under a fault, watched from outside, and what became of its samples.

A job that neither ends nor goes on within a limit is killed with its whole process group: a hang.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

RECOVERED, CLEAR, UNCLEAR = "all, each once", "one clear error", "error, unclear"
SHORT, WRONG, REPEATS, HANG = "short epoch, silent", "wrong bytes, silent", "repeats, silent", "hang"
LIMIT = 45.0
"""Seconds without anything new after which a job is killed."""


@dataclass(frozen=True)
class Setting:
    """How a job reads: its class (``opsin``, ``mixed``: Opsin's with a schedule of streams, or ``stock``) and its workers."""

    cls: str
    workers: int
    persistent: bool = False

    def __str__(self) -> str:
        return f"{self.cls}, {self.workers} workers{', persistent' if self.persistent else ''}"


@dataclass
class Outcome:
    """What became of a trial.

    ``kind``: one of the names above; ``line``: what it said; ``tokens``: of the jobs, as Opsin names shared memory;
    ``log``: standard error.
    """

    kind: str
    seconds: float
    line: str = ""
    detail: str = ""
    tokens: list[str] = field(default_factory=list)
    log: str = ""

    def __str__(self) -> str:
        said = f": {self.line}" if self.line else ""
        return f"{self.kind} ({self.seconds:.1f} s){said}{' | ' + self.detail if self.detail else ''}"


class Job:
    """A running job."""

    def __init__(self, lab: Lab, spec: dict[str, Any]):
        self.lab, self.spec, self.started = lab, spec, time.monotonic()
        self.pid = lab.fork(spec)
        self.status: int | None = None
        self.hung = False

    def events(self) -> list[dict[str, Any]]:
        file = Path(self.spec["events"])
        # The last line of a killed job may be half a line.
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        return [json.loads(line) for line in lines]

    def at_gate(self, name: str, limit: float = LIMIT) -> dict[str, Any] | None:
        """Wait until the job waits there; None: it has ended before, or never came."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            ended = self.lab.ended.get(self.pid) is not None
            for event in self.events():
                if event.get("gate") == name:
                    return event
            if ended:
                return None
            time.sleep(0.03)
        return None

    def go_on(self, name: str) -> None:
        Path(f"{self.spec['events']}.{name}").touch()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, limit: float = LIMIT) -> None:
        """Until it ends; when nothing new has come for so long, or after four times as long, it is killed."""
        began = until = time.monotonic()
        told, events = -1, Path(self.spec["events"])
        while (status := self.lab.ended.get(self.pid)) is None:
            size = events.stat().st_size if events.is_file() else 0
            if size != told:
                told, until = size, min(time.monotonic() + limit, began + 4 * limit)
            if time.monotonic() > until and not self.hung:
                self.hung = True
                self.seconds = time.monotonic() - self.started
                self.kill()
            time.sleep(0.02)
        self.status = status
        if not self.hung:
            self.seconds = time.monotonic() - self.started
        self.kill()  # what it may have left: a resource tracker, workers


class Lab:
    """Starts jobs; ``root`` is where all their files are.

    Args:
        samples: id -> digest of what was stored.
    """

    def __init__(self, root: Path, samples: dict[str, str]):
        self.root, self.samples = root, samples
        self.ended: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        command = [sys.executable, str(HERE / "fault_zygote.py")]
        # A mount namespace of its own, for small disks.
        self.mounts = shutil.which("unshare") is not None and not subprocess.run(
            ["unshare", "-rm", "true"], capture_output=True
        ).returncode  # fmt: skip
        if self.mounts:
            command = ["unshare", "-rm", *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
        self._zygote = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=root
        )
        assert self._zygote.stdout is not None
        self._answers = iter(self._zygote.stdout)
        next(self._answers)  # it is ready
        self._forked: list[int] = []
        self._news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._answers:
            answer = json.loads(line)
            with self._news:
                if "pid" in answer:
                    self._forked.append(answer["pid"])
                else:
                    self.ended[answer["ended"]] = answer["status"]
                self._news.notify_all()

    def fork(self, spec: dict[str, Any]) -> int:
        assert self._zygote.stdin is not None
        with self._lock:
            self._zygote.stdin.write(json.dumps(spec).encode() + b"\n")
            self._zygote.stdin.flush()
            with self._news:
                if not self._news.wait_for(lambda: self._forked, 60):
                    raise RuntimeError("the zygote does not answer")
                return self._forked.pop()

    def close(self) -> None:
        assert self._zygote.stdin is not None
        self._zygote.stdin.close()
        try:
            self._zygote.wait(20)
        except subprocess.TimeoutExpired:
            self._zygote.kill()
            self._zygote.wait(10)

    def job(self, setting: Setting, folder: Path, remote: str, **spec: Any) -> Job:
        """Start a job; ``folder`` has its cache and is that of its second run, too."""
        number = next(self._numbers)
        folder.mkdir(parents=True, exist_ok=True)
        return Job(
            self,
            {
                "cls": setting.cls, "workers": setting.workers, "persistent": setting.persistent, "remote": remote,
                "local": str(folder / "cache"), "epochs": 2, "state": None, "gate": None, "together": False,
                "collate": "digests", "mount": None, "fill": None, "options": {}, "number": 1000 * number,
                "events": str(folder / f"events-{number}"), "log": str(folder / f"log-{number}"),
                "tmp": tempfile.mkdtemp(dir=folder), **spec, "env": {**spec.get("env", {})},
            },
        )  # fmt: skip

    def forget(self, job: Job) -> None:
        """Remove what a stock job has left in shared memory, which nobody else ever does."""
        if job.spec["cls"] == "stock":
            for path in Path("/dev/shm").glob(f"{job.spec['number'] // 1000:03}???_*"):
                path.unlink(missing_ok=True)


def judge(lab: Lab, jobs: list[Job], clear: str, blank: int = 0, lost: int = 0) -> Outcome:
    """What became of the samples of one job, or of several that went on from each other.

    Args:
        clear: pattern of what a clear error says, beside a shard or an address.
        blank: samples that must be left blank, and said to be.
        lost: jobs that were killed on purpose, from the first on.
    """
    seconds, events = jobs[-1].seconds, [e for job in jobs for e in job.events()]
    log = "\n".join(Path(job.spec["log"]).read_text(errors="replace")[-3000:] for job in jobs)
    tokens = [e["token"] for e in events if "token" in e]
    made: Callable[..., Outcome] = lambda kind, **more: Outcome(kind, seconds, tokens=tokens, log=log, **more)  # noqa: E731
    epochs: dict[int, Counter[str]] = {}
    wrong: set[str] = set()
    blanks: Counter[int] = Counter()
    for event in events:
        for id_, digest in event.get("batch", ()):
            epochs.setdefault(event["epoch"], Counter())[id_] += 1
            if digest == "blank":
                blanks[event["epoch"]] += 1
            elif lab.samples.get(id_) != digest:
                wrong.add(id_)
    ended = {e["epoch"] for e in events if e.get("ended")}
    served = ", ".join(f"{len(ids)} of {len(lab.samples)}" for _, ids in sorted(epochs.items())) or "none"
    if wrong:
        return made(WRONG, detail=f"{len(wrong)} samples")
    if any(count > 1 for ids in epochs.values() for count in ids.values()):
        return made(REPEATS, detail=served)
    if any(len(epochs.get(epoch, ())) < len(lab.samples) for epoch in ended):
        return made(SHORT, detail=served)
    if jobs[-1].hung:
        return made(HANG, detail=served)
    errors = [e for job in jobs[lost:] for e in job.events() if "error" in e]
    if errors:
        line, ours = errors[-1]["line"], errors[-1]["ours"]
        names = re.search(r"shard\.\d+|s3://|127\.0\.0\.1|index\.json", line)
        said = names and re.search(clear, line, re.IGNORECASE) and "\n" not in line
        if jobs[-1].spec["cls"] != "stock":
            said = said and ours
        return made(CLEAR if said else UNCLEAR, line=line, detail=served)
    if any(job.status != 0 for job in jobs[lost:]):
        return made(UNCLEAR, line=f"ended with {jobs[-1].status}, saying nothing", detail=served)
    if any(blanks[epoch] != blank for epoch in epochs):
        return made(WRONG, detail=f"blank samples: {dict(blanks)}")
    return made(RECOVERED if len(ended) == 2 else SHORT, detail=served)
