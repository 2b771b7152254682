"""Jobs keep out of each other's shared memory, locks and caches, and leave nothing, however they end."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from streaming.base import dataset as stock_dataset
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import prefix as stock_prefix
from streaming.base.world import World

from opsin.data import shared_memory
from opsin.data.schema import COLUMNS, HASHES
from opsin.data.shared_memory import Prefix, own_cache
from opsin.data.streaming import StreamingVLMDataset
from opsin.models.errors import UserError

import zoo
from ranks import RankPool

FORK = mp.get_context("fork")
pytestmark = pytest.mark.skipif(
    not Path("/dev/shm").is_dir(), reason="looks at shared memory as Linux shows it"
)


@pytest.fixture
def folder(tmp_path: Path, own_cache: None) -> str:
    with MDSWriter(out=str(tmp_path / "data"), columns=COLUMNS, hashes=list(HASHES)) as writer:
        for i in range(8):
            writer.write(zoo.sample(i))
    return str(tmp_path / "data")


def left(token: str) -> list[Path]:
    """What there is of a job: its segments and its folder."""
    root = shared_memory.job().root
    return [*Path("/dev/shm").glob(f"{token}*"), *root.glob(token)]


def at_once(barrier: Any) -> None:
    """Let Streaming go on from finding a number to taking it only together with another process."""
    find = stock_prefix._check_and_find_retrying

    def found(*args: Any, shm_name: str, **kwargs: Any) -> int:
        number = find(*args, shm_name=shm_name, **kwargs)
        if shm_name == SHM_TO_CLEAN[-1]:
            barrier.wait(60)
        return number

    stock_prefix._check_and_find_retrying = found


def forked(target: Any, *args: Any, count: int = 2) -> list[Any]:
    """What several real processes answer that run the same thing."""
    answers = FORK.Queue()

    def work() -> None:
        try:
            answers.put(target(*args))
        except BaseException as error:
            answers.put(error)

    processes = [FORK.Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return got


def take_stock_number(barrier: Any, folder: str) -> str:
    # As upstream has it, whatever earlier tests have changed in this process.
    stock_prefix._each_prefix_int = lambda: iter(range(10**6))
    stock_prefix.gettempdir = tempfile.gettempdir
    at_once(barrier)
    number, memory = stock_prefix.get_shm_prefix([folder], [None], World.detect())
    time.sleep(0.5)
    memory.cleanup()
    return f"{number:06}"


def test_stock_jobs_that_start_in_the_same_instant_take_the_same_number(folder: str) -> None:
    """When this fails, Streaming has mended it, and ``private_names`` may go."""
    got = forked(take_stock_number, FORK.Barrier(2), folder)
    assert any(isinstance(answer, FileExistsError) for answer in got), got


def open_together(barrier: Any, folder: str) -> tuple[str, int, list[str]]:
    at_once(barrier)
    dataset = StreamingVLMDataset(remote=folder, batch_size=1, shuffle=False)
    return shared_memory.job().token, os.getpid(), [s["id"] for s in dataset]


def test_jobs_that_start_in_the_same_instant_do_not_meet(folder: str) -> None:
    for _ in range(5):
        got = forked(open_together, FORK.Barrier(2), folder)
        assert not [answer for answer in got if isinstance(answer, BaseException)], got
        (one, _, first), (other, _, second) = got
        assert one != other and first == second and len(first) == 8
        assert left(one) == [] and left(other) == []  # both have ended


JOB = """
import sys, time
from opsin.data import shared_memory
from opsin.data.streaming import StreamingVLMDataset
dataset = StreamingVLMDataset(remote=sys.argv[1], batch_size=1, shuffle=False)
next(iter(dataset))
print(shared_memory.job().token, flush=True)
time.sleep(float(sys.argv[2]))
"""


def start(folder: str) -> Any:
    """Another job, from nothing, with an open dataset."""
    command = [sys.executable, "-c", JOB, folder, "600"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_what_a_killed_job_leaves_the_next_one_removes_and_a_living_jobs_stays(folder: str) -> None:
    living, killed = start(folder), start(folder)  # together: imports are what takes long
    try:
        its, token = (process.stdout.readline().strip() for process in (living, killed))
        here = left(its)
        assert len(here) > 5 and any(p.name.endswith(LOCALS) for p in here) and len(left(token)) > 5
        os.killpg(killed.pid, signal.SIGKILL)  # its resource tracker, too
        killed.wait(10)
        assert len(left(token)) > 5
        [(own, _, ids)] = forked(
            open_together, FORK.Barrier(1), folder, count=1
        )  # starts, and ends by itself
        assert len(ids) == 8
        assert left(token) == [] and left(own) == []
        assert left(its) == here and living.poll() is None
    finally:
        for process in (living, killed):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
            process.stdout.close()


def test_nothing_is_left_in_the_temporary_folder(folder: str) -> None:
    dataset = StreamingVLMDataset(remote=folder, batch_size=1, shuffle=False)
    assert len(list(dataset)) == 8
    locks = {Path(dataset._cache_filelock_path), Path(dataset._shared_barrier.filelock_path)}
    assert {lock.parent for lock in locks} == {shared_memory.job().folder}
    # That of the cache is made when a shard has to be fetched: here all of them lie in a folder.
    assert Path(dataset._shared_barrier.filelock_path).is_file()
    assert dataset._filelock_root == str(shared_memory.job().folder)


def test_a_number_is_written_with_its_token_wherever_it_travels() -> None:
    number = pickle.loads(pickle.dumps(Prefix(3, "0123abcd")))
    names = [stock_prefix._get_path(number, what) for what in SHM_TO_CLEAN]
    assert names[0] == "0123abcd003_locals" and max(map(len, names)) <= 30
    assert f"{number}" == "3" and number == 3 and max([number, Prefix(2, "0123abcd")]).token == "0123abcd"
    assert stock_dataset._get_path is stock_prefix._get_path  # one function makes all names


# --- caches


@pytest.fixture
def other() -> Iterator[Any]:
    """Another job that takes a cache, and can be ended."""
    made = []

    def take(folder: Path, given: bool = False, children: float = 0.0) -> Any:
        ready = FORK.Event()

        def work() -> None:
            own_cache(folder, given=given)
            if children and not os.fork():
                time.sleep(children)  # as a worker that outlives its killed job for a while
                os._exit(0)
            ready.set()
            time.sleep(600)

        process = FORK.Process(target=work, daemon=True)
        process.start()
        made.append(process)
        assert ready.wait(60)
        return process

    yield take
    for process in made:
        process.kill()
        process.join(10)


def test_two_jobs_never_share_a_cache(tmp_path: Path, other: Any) -> None:
    cache = tmp_path / "cache"
    holder = other(cache)
    assert own_cache(cache, given=False) == tmp_path / "cache-2"
    assert own_cache(cache, given=False) == tmp_path / "cache-2"  # again, in the same job
    asked = tmp_path / "asked"
    holder = other(asked, given=True)
    with pytest.raises(UserError, match=rf"'{asked}' is used by another job \(process {holder.pid}\)"):
        own_cache(asked, given=True)
    assert own_cache(tmp_path / "free", given=True) == tmp_path / "free"


def test_a_killed_jobs_cache_is_taken_over_when_its_workers_are_gone(tmp_path: Path, other: Any) -> None:
    cache = tmp_path / "cache"
    holder = other(cache, children=1.5)
    holder.kill()
    holder.join(10)
    assert own_cache(cache, given=False) == cache  # and not fetched anew beside it


@pytest.mark.world
def test_all_ranks_are_one_job(ranks: RankPool, folder: str) -> None:
    one, two = ranks.run("jobs:job_of_dataset", remote=folder)
    assert one == two and one[0] != shared_memory.job().token
