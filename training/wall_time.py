"""How long a run took, over all processes that worked on it: one that was killed could not write it down itself."""

from __future__ import annotations

import json
import time
from pathlib import Path

from .run_folder import RunFolder, write_atomically


def begin(folder: RunFolder, started: float) -> None:
    """Note that a process works on this run since ``started`` (seconds of ``time.time``)."""
    spans = _spans(folder)
    if spans and spans[-1][1] is None:
        spans[-1][1] = _last_sign_of_life(folder, spans[-1][0])
    _write(folder, [*spans, [started, None]])


def end(folder: RunFolder) -> None:
    """Note that this process is done; what it writes after its summary is not counted."""
    spans = _spans(folder)
    if spans:
        spans[-1][1] = time.time()
        _write(folder, spans)


def seconds(folder: RunFolder) -> float | None:
    """Sum over all processes; None if nothing was noted."""
    spans = [(_last_sign_of_life(folder, a) if b is None else b) - a for a, b in _spans(folder)]
    return round(sum(spans), 1) if spans else None


def _last_sign_of_life(folder: RunFolder, started: float) -> float:
    """When a killed process last logged a step."""
    written = folder.metrics.stat().st_mtime if folder.metrics.is_file() else started
    return max(started, written)


def _file(folder: RunFolder) -> Path:
    return folder.path / "processes.json"


def _spans(folder: RunFolder) -> list[list]:
    """[began, ended or None] of each process, in order."""
    path = _file(folder)
    return json.loads(path.read_text()) if path.is_file() else []


def _write(folder: RunFolder, spans: list[list]) -> None:
    write_atomically(_file(folder), json.dumps(spans) + "\n")
