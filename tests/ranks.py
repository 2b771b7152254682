"""A pool of two kept-alive ranks (gloo, CPU) that serves all tests: starting is what costs, so they are forked (``forks``).

    pool.run("opsin_jobs:train", algorithms=[...])  ->  [result of rank 0, result of rank 1]

A job is ``module:function`` importable from ``tests/``; arguments and results travel by pickle between
processes that this module started itself.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import forks


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "NODE_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )
    sys.path.insert(0, forks.TESTS)
    import torch

    torch.set_num_threads(1)
    from composer.utils import dist

    dist.initialize_dist("cpu", timeout=120)
    pipe.send("ready")
    while True:
        job = pipe.recv()
        if job is None:
            return
        name, kwargs = job
        try:
            module, function = name.split(":")
            result = getattr(importlib.import_module(module), function)(**kwargs)
            pipe.send((True, result))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class RankPool:
    """``world`` processes that run jobs together.

    Args:
        world: how many.
    """

    def __init__(self, world: int = 2):
        self.world = world
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def _start(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = forks.context()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)
        for pipe in self.pipes:
            if not pipe.poll(180):
                self.close()
                raise RuntimeError("the ranks did not start within 180 s")
            assert pipe.recv() == "ready"

    def run(self, job: str, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """Run a job on all ranks; results in the order of ranks. A rank's error or silence ends the pool."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((job, kwargs))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(
                    f"rank {rank} did not answer {job} within {timeout} s: the ranks wait for each other"
                )
            ok, value = pipe.recv()
            if not ok:
                self.close()
                raise RuntimeError(f"rank {rank}, {job}: {value}")
            results.append(value)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        self.processes, self.pipes = [], []
