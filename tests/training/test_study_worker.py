"""A study's worker: it answers what it is asked, and ends with whoever asks, in the middle of a run too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("worker")
    scenes = runs.write_scenes(folder / "scenes", 32, stream="vqa")
    return runs.config_file(folder, scenes, "base.yaml", save_interval="100000ba")


def ask(worker: subprocess.Popen[str], base: str, root: Path, name: str, duration: str) -> Path:
    """Hand over a task; where its metrics go."""
    task: dict[str, Any] = {
        "name": name, "files": [base], "evaluation": [], "folder": str(root / "cells" / name),
        "arguments": [f"run_name={name}", f"run_root={root}", f"max_duration={duration}", "progress_bar=false"],
    }  # fmt: skip
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(task) + "\n")
    worker.stdin.flush()
    return root / name / "metrics.jsonl"


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
        # One run after the other, the second asked for as soon as the first is answered.
        for name in ("first", "second"):
            ask(worker, base, tmp_path, name, "2ba")
            answer = json.loads(worker.stdout.readline())
            assert (answer["name"], answer["status"], answer["cost"]["steps"]) == (name, "done", 2)
        metrics = ask(worker, base, tmp_path, "endless", "1000000ba")
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.stat().st_size):
            assert worker.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        worker.stdin.close()  # as when the study's process is killed
        assert worker.wait(60) == 1
        assert worker.stdout.read() == ""
        assert "the study's process is gone" in log.read_text()
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
