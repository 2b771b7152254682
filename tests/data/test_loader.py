"""What is said about a worker that died, whichever of torch's errors comes first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

from opsin.data.loader import lost_worker


def test_a_killed_worker_is_told_as_killed_in_each_form_of_torchs_error() -> None:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)
    by_signal = RuntimeError(f"DataLoader worker (pid {worker.pid}) is killed by signal: Killed. ")
    later = RuntimeError(f"DataLoader worker (pid(s) {worker.pid}) exited unexpectedly")
    only_later = RuntimeError(str(later))
    later.__cause__ = by_signal
    for error, workers in ((by_signal, ()), (later, ()), (only_later, [worker])):
        said = str(lost_worker(error, "s3://data/scenes", workers))
        assert f"worker process {worker.pid} that loads data was killed by signal: " in said
    said = str(lost_worker(only_later))  # nobody knows more
    assert f"worker process {worker.pid} that loads data exited unexpectedly" in said


def test_other_errors_are_not_about_workers() -> None:
    assert lost_worker(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_worker(ValueError("DataLoader worker (pid 5) is killed by signal: Killed. ")) is None
