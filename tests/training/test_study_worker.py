"""A study's worker: it answers what it is asked, and ends with whoever asks, in the middle of a run too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("worker")
    scenes = runs.write_scenes(folder / "scenes", 32, stream="vqa")
    return runs.config_file(folder, scenes, "base.yaml", save_interval="100000ba")


def ask(worker: subprocess.Popen[str], base: str, root: Path, name: str, *more: str) -> Path:
    """Hand over a task; where its metrics go."""
    task: dict[str, Any] = {
        "name": name, "files": [base], "evaluation": [], "folder": str(root / "cells" / name),
        "arguments": [f"run_name={name}", f"run_root={root}", "progress_bar=false", *more],
    }  # fmt: skip
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(task) + "\n")
    worker.stdin.flush()
    return root / name / "metrics.jsonl"


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and that nobody has asked for is dead."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_it_ends_when_nobody_is_there_for_its_answer(base: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-m", "opsin.training.study.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        assert worker.stdin is not None and worker.stdout is not None
        assert json.loads(worker.stdout.readline()) == {"ready": True}
        # One run after the other, the second asked for as soon as the first is answered; and it has a loader's process.
        for name, processes in (("first", 0), ("second", 1)):
            ask(worker, base, tmp_path, name, "max_duration=2ba", f"train_loader.num_workers={processes}")
            answer = json.loads(worker.stdout.readline())
            assert (answer["name"], answer["status"], answer["cost"]["steps"]) == (name, "done", 2)
        metrics = ask(
            worker, base, tmp_path, "endless", "max_duration=1000000ba", "train_loader.num_workers=1"
        )
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.stat().st_size):
            assert worker.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        processes = psutil.Process(worker.pid).children(recursive=True)
        assert processes
        worker.stdin.close()  # as when the study's process is killed
        assert worker.wait(60) == 1
        assert worker.stdout.read() == ""
        assert "the study's process is gone" in log.read_text()
        deadline = time.monotonic() + 60
        while any(map(alive, processes)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        worker.kill()
        worker.wait(30)


def test_it_ends_well_when_it_is_not_needed_any_more() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "opsin.training.study.worker"],
        input="",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (0, '{"ready": true}\n')
