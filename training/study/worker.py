"""A process that trains and evaluates runs of a study, one after the other: imports are paid once, not once a run.

It reads a JSON line a run from its input and answers with one on its output; what is printed meanwhile goes to its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

PEAK = "VmHWM:"


def reset_peak() -> None:
    """Forget the largest resident size so far, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Largest resident size since :func:`reset_peak`, or largest allocation of the GPU; None: not known here."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(PEAK)), None)


def perform(task: dict[str, Any]) -> dict[str, Any]:
    """Train one run, or find it trained; evaluate it; returns its cost.

    Args:
        task: ``files``, ``arguments`` (of ``opsin train``), ``evaluation`` (YAMLs of ``opsin eval``), ``folder`` for scores.
    """
    import torch
    from rich.console import Console

    from ..config import load
    from ..eval_config import split_given
    from ..evaluate import evaluate_model
    from ..train import train

    console = Console(file=sys.stderr, width=110)
    reset_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    run = train(load(task["files"], task["arguments"]), console)
    peak = peak_bytes()
    began = time.monotonic()
    if task["evaluation"]:
        folder = Path(task["folder"])
        files, arguments = split_given(task["evaluation"])
        evaluate_model(str(run.path), files, arguments, folder, console)
    spent = stage_costs(run.path)
    return {"cost": {**spent, "peak_bytes": peak, "evaluation_seconds": round(time.monotonic() - began, 1)}}


def stage_costs(run: Path) -> dict[str, Any]:
    """Steps and seconds of a finished run's stages; one that was taken from another run counts with what it cost there."""
    steps, seconds, tokens, folder = 0, 0.0, 0, run
    for name in json.loads((run / "stages.json").read_text()):
        folder = run / "stages" / name
        done = json.loads((folder / "done.json").read_text())
        while "steps" not in done and "taken_from" in done:
            folder = Path(done["taken_from"]).parent
            done = json.loads((folder / "done.json").read_text())
        steps += int(done.get("steps", 0))
        tokens += int(done.get("tokens", 0))
        seconds += float(done.get("seconds", 0.0))
    spent = {"steps": steps, "tokens": tokens, "seconds": round(seconds, 1)}
    return {**spent, "seconds_a_step": _median_step(folder.parents[1], folder.name)}


def _median_step(run: Path, last: str) -> float | None:
    """Median seconds of a step of the last stage, from Composer's speed monitor; None: too few steps for its window.

    Args:
        run: that trained it.
        last: name of the stage.
    """
    from statistics import median

    from ..metrics_file import read_metrics

    rates = [
        m.get("throughput/batches_per_sec") for m in read_metrics(run / "metrics.jsonl") if m["stage"] == last
    ]
    rates = [rate for rate in rates if rate]
    return round(1 / median(rates), 5) if rates else None


def take_input() -> IO[str]:
    """The process's input as a file of its own, and nothing in its place.

    A loader's processes close the standard input first of all, which would wait for ever for a thread that reads from it:
    forked processes have its lock, but not the thread.
    """
    taken = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return taken


def listen(asked: IO[str], tasks: SimpleQueue[str | None], busy: threading.Event) -> None:
    """Hand over each line, None when they end; ends the process if that is in the middle of a task.

    Whoever asked is gone then, killed perhaps. The same study may be started again at any time, and two processes must not
    write into one run's folder.

    Args:
        asked: a task a line, the next one after the answer to the one before.
        tasks: where they go.
        busy: set while a task is at work; who answers it clears this.
    """
    try:
        for line in asked:
            busy.set()  # before the other thread sees the task
            tasks.put(line)
    finally:  # whatever went wrong with reading, nothing will be asked any more
        if busy.is_set():
            try:
                os.write(2, b"the study's process is gone: this run ends here\n")
            finally:
                os._exit(1)  # as a kill would, from which a run goes on: what counts as done is written whole
        tasks.put(None)


def serve() -> None:
    """Answer tasks, one at a time, until the input ends; a run that fails is told, and the next one tried."""
    from ...models.errors import UserError, one_line, user_error_in

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not come between the answers
    tasks: SimpleQueue[str | None] = SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=listen, args=(take_input(), tasks, busy), daemon=True).start()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    while (line := tasks.get()) is not None:
        task = json.loads(line)
        try:
            answer = {"status": "done", **perform(task)}
        except Exception as error:
            mended = error if isinstance(error, UserError) else user_error_in(error)
            why = (
                one_line(mended)
                if mended is not None
                else f"{type(error).__name__}: {str(error).splitlines()[:1]}"
            )
            import traceback

            traceback.print_exc()
            answer = {"status": "failed", "why": why}
        busy.clear()  # before the answer, which the next task may follow at once
        print(json.dumps({"name": task["name"], **answer}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
