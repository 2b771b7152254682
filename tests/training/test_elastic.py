"""A run goes on with more ranks and with fewer: same samples in the same order, same losses, all four methods on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

import restarts
from ranks import RankPool
from restarts import STEPS, cut_back, each_once, served, told

FSDP2 = {"parallelism_config": {"fsdp2": {}}}


@pytest.fixture(scope="module")
def one() -> Path:
    return restarts.one()


def whole(parts: dict[int, Path]) -> dict[int, dict[str, Any]]:
    """What was served from each part's first step on, up to the next part's."""
    steps: dict[int, dict[str, Any]] = {}
    for first, run in sorted(parts.items()):
        steps = {k: v for k, v in steps.items() if k < first} | {
            k: v for k, v in served(run).items() if k >= first
        }
    return steps


@pytest.mark.world
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_one_rank_then_two_then_one(tmp_path: Path, one: Path, ranks: RankPool, layout: str) -> None:
    """Stopped after 4 and after 8 of 10 steps, that is within the first epoch and between two."""
    each_once(served(one))
    cut_back(one, tmp_path / "two" / "runs" / "four", 4)
    more = FSDP2 if layout == "fsdp2" else {}
    config = restarts.config(tmp_path / "two", **more)
    two = Path(ranks.run("restarts:run", files=[config], timeout=240)[0])
    cut_back(two, tmp_path / "again" / "runs" / "four", 8)
    again = Path(restarts.run([restarts.config(tmp_path / "again")]))
    steps = whole({0: one, 4: two, 8: again})
    assert steps == served(one)
    each_once(steps)
    restarts.same(told(again), told(one), 1e-5)
    assert len({str(p) for p in two.rglob("rank*.jsonl")}) == 2  # both ranks had their share


def killed(pool: RankPool, config: str, folder: Path, lines: int) -> None:
    """Start a run on all ranks and kill them (SIGKILL) when it has logged so many steps."""
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            pool.run("restarts:run", files=[config], timeout=240)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 240
    try:
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < lines:
            assert thread.is_alive() and time.monotonic() < deadline, failed
            time.sleep(0.01)
    finally:
        for process in pool.processes:
            process.kill()
    thread.join(60)
    pool.close()


@pytest.mark.slow
@pytest.mark.world
@pytest.mark.timeout(900)
def test_two_ranks_killed_then_four_killed_then_one(tmp_path: Path, one: Path) -> None:
    """Real processes, killed at no step in particular; sharded on two, replicated on four."""
    run = tmp_path / "runs" / "four"
    killed(RankPool(2), restarts.config(tmp_path, **FSDP2), run, 3)
    killed(RankPool(4), restarts.config(tmp_path), run, 7)
    restarts.run([restarts.config(tmp_path)])
    assert served(run) == served(one)
    each_once(served(run))
    restarts.same(told(run), told(one), 1e-5)
    assert len(told(run)) == STEPS
