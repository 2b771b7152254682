"""What is said about a worker that died, whichever of torch's errors comes first, and by one whose main process went."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from multiprocessing import connection, process, reduction, resource_sharer
from typing import Any

import pytest

from opsin.data.loader import VLMLoader, _Batches, build_loader, lost_worker
from opsin.models.errors import UserError


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


class Closed:
    """An epoch whose next batch has tensors that nobody hands over any more."""

    def __init__(self, error: Exception, worker: Any):
        self.error, self._workers = error, [worker]

    def __next__(self) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "Connection refused"), EOFError()], ids=str)
def test_a_worker_that_was_killed_before_it_handed_over_its_tensors_is_told(error: Exception) -> None:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    assert worker.pid is not None
    samples: Any = [1, 2]
    loader = VLMLoader(samples)
    try:
        with pytest.raises(type(error)):  # the worker lives: it is another connection
            next(_Batches(Closed(error, worker), loader))
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(
            UserError, match=f"worker process {worker.pid} that loads data was killed by signal: "
        ):
            next(_Batches(Closed(error, worker), loader))
    finally:
        worker.kill()
        worker.join(60)


def test_other_errors_are_not_about_workers() -> None:
    assert lost_worker(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert lost_worker(ValueError("DataLoader worker (pid 5) is killed by signal: Killed. ")) is None


class Handles:
    """What the thread that hands over tensors knows a worker's tensor by: its socket, and a key there."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[str, int]:
        read, write = os.pipe()
        os.close(write)
        return resource_sharer.DupFd(read)._id  # type: ignore[attr-defined]


def test_a_worker_is_silent_when_the_main_process_went_away_and_about_nothing_else(
    capfd: pytest.CaptureFixture[str],
) -> None:
    loader = build_loader(lambda samples: samples, Handles(), 4, num_workers=1, timeout=60)  # type: ignore[arg-type]
    batches = iter(loader)
    ids: Any = next(batches)
    address = ids[0][0]
    key = process.current_process().authkey

    def served(
        ident: tuple[str, int],
    ) -> None:  # one client after the other, so all earlier ones were dealt with
        with resource_sharer._resource_sharer.get_connection(ident) as client:  # type: ignore[attr-defined]
            os.close(reduction.recv_handle(client))

    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)  # left before it said who it is
    with connection.Client(address, authkey=key):
        pass  # left before it said what it wants
    with (
        connection.Client(address, authkey=key) as whole,
        socket.socket(fileno=os.dup(whole.fileno())) as client,
    ):
        client.sendall(b"\0\0\1\0half")  # left in the middle of it
    served(ids[1])
    assert capfd.readouterr().err == ""
    with connection.Client(address, authkey=key) as client:
        client.send((10**6, os.getpid()))
    served(ids[2])
    said = capfd.readouterr().err
    assert "Traceback" in said and "KeyError: 1000000" in said
    del batches
