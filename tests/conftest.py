"""Shared fixtures: offline, few threads, one pool of ranks."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

from ranks import RankPool
from spread import pytest_collection_modifyitems, pytest_xdist_make_scheduler  # noqa: F401  (hooks)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Two ranks, started at first use and kept alive."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Four ranks, started at first use and kept alive."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small dataset of scenes."""
    import runs

    return runs.write_scenes(tmp_path_factory.mktemp("data") / "scenes")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real S3 server on loopback; yields the folder whose subfolders are its buckets."""
    root = tmp_path_factory.mktemp("s3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "localbucket", str(root), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (root / "data").mkdir()
    names = {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port), 5).close()
                break
            except OSError:
                time.sleep(0.05)
        yield root
    finally:
        server.terminate()
        server.wait(10)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own; environment variables that a run sets do not outlive the test."""
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class _Registered:
    """Stands in for ``atexit`` in Streaming's module of shared memory: what is registered there can be let go."""

    def __init__(self) -> None:
        self.made: list = []

    def register(self, cleanup: Callable[[], None]) -> None:
        self.made.append(cleanup.__self__)

    def release(self) -> None:
        made, self.made = self.made, []
        for memory in made:
            for part in [*memory.created_shms, *memory.opened_shms]:
                with contextlib.suppress(FileNotFoundError):
                    if part in memory.created_shms:
                        part.unlink()
                with contextlib.suppress(BufferError):  # a dataset that is still held; closed when it goes
                    part.close()


_registered = _Registered()


@pytest.fixture(autouse=True)
def _shared_memory() -> Iterator[None]:
    """Give Streaming's shared memory back after each test.

    Streaming 0.13.0 keeps the shared memory of every dataset until the process ends, and opens that of all
    earlier ones when it makes another: with some four hundred datasets in a process that is 20,000 open files.
    """
    memory = sys.modules.get("streaming.base.shared.memory")
    if memory is not None:
        memory.atexit = _registered  # type: ignore[attr-defined]
    yield
    _registered.release()
