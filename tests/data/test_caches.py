"""Copies of shards: evicted and fetched again over several epochs, and a cache for each of several machines."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from torch.utils.data import DataLoader

from opsin.data import mixture
from opsin.data.schema import COLUMNS, HASHES
from opsin.data.streaming import StreamingVLMDataset

import zoo

SIZE, LIMIT = 160, 16 * 1024
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def stored(s3: Path) -> tuple[str, Path]:
    """Address and folder of a dataset of some fifteen shards."""
    with MDSWriter(out="s3://data/many", columns=COLUMNS, hashes=list(HASHES), size_limit=4000) as writer:
        for i in range(SIZE):
            writer.write(zoo.sample(i, images=i % 3))
    folder = s3 / "data" / "many"
    assert len(list(folder.glob("shard.*"))) > 10
    return "s3://data/many", folder


def kept(dataset: StreamingVLMDataset) -> int:
    """Bytes of copies."""
    return sum(file.stat().st_size for s in dataset.streams for file in Path(s.local).glob("shard.*"))


@pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixed"])
@pytest.mark.parametrize(("workers", "predownload"), [(0, 4), (2, 8), (2, None)])
def test_each_epoch_is_whole_in_a_cache_of_a_third_of_the_data(
    stored: tuple[str, Path],
    workers: int,
    predownload: int | None,
    mixed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixture, "SMALL", 0)  # the passes of a stream as small as this one know no shards
    address, folder = stored
    assert sum(file.stat().st_size for file in folder.glob("shard.*")) > 3 * LIMIT
    options: dict[str, Any] = {
        "batch_size": 4,
        "shuffle": True,
        "cache_limit": LIMIT,
        "predownload": predownload,
    }
    if mixed:
        options |= {"streams": {"a": {"remote": address}}, "mixture": {"weights": {"a": 1}}}
    else:
        options |= {"remote": address}
    dataset = StreamingVLMDataset(**options, shuffle_block_size=16)
    orders = []
    for _ in range(3):
        loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=list, timeout=60 if workers else 0)
        ids = [s["id"] for batch in loader for s in batch]
        assert sorted(ids) == sorted(zoo.sample(i)["id"] for i in range(SIZE))
        assert 0 < kept(dataset) <= LIMIT
        orders.append(ids)
    assert orders[0] != orders[1] != orders[2]


NODE = """
import json, sys
from pathlib import Path
import torch.distributed as dist
dist.init_process_group("gloo")
from torch.utils.data import DataLoader
from opsin.data import mixture
from opsin.data.loader import build_loader
from opsin.data.streaming import StreamingVLMDataset
mixture.SMALL = 0  # or all machines would read a stream as small as this one
out, address, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
place = {"streams": {"a": {"remote": address}}} if "mixture" in options else {"remote": address}
dataset = StreamingVLMDataset(**place, batch_size=4, shuffle=True, num_canonical_nodes=2, tail="fill", **options)
loader = build_loader(list, dataset, 4, num_workers=2)
first = [[s["id"] for s in batch] for batch in loader]
copies = sorted(p.name for p in Path(dataset.streams[0].local).glob("shard.*"))
second = [[s["id"] for s in batch] for batch in loader]
Path(out).write_text(json.dumps({"epochs": [first, second], "copies": copies, "local": dataset.streams[0].local}))
dist.barrier()
"""


def on_two_machines(folder: Path, address: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """A job of two ranks, each in a mount namespace with shared memory of its own, as on another machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    try:
        for rank in range(2):
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "OPSIN_CACHE": str(folder / f"cache-{rank}"),
            }  # fmt: skip
            inside = 'mount -t tmpfs none /dev/shm && exec "$@"'
            job = [sys.executable, "-c", NODE, str(folder / f"{rank}.json"), address, json.dumps(options)]
            processes.append(
                subprocess.Popen(
                    ["unshare", "-rm", "sh", "-c", inside, "sh", *job],
                    env=environment,
                    start_new_session=True,
                )
            )
        assert [process.wait(200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait(10)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def has_namespaces() -> bool:
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /dev/shm"]
    return shutil.which("unshare") is not None and not subprocess.run(probe, capture_output=True, check=False).returncode  # fmt: skip


@pytest.mark.world
@pytest.mark.skipif(not has_namespaces(), reason="needs mount namespaces (unshare)")
@pytest.mark.parametrize("mixed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["one", "mixed"])
def test_two_machines_with_their_own_caches_share_an_epoch(
    stored: tuple[str, Path], tmp_path: Path, mixed: bool
) -> None:
    address, folder = stored
    nodes = on_two_machines(tmp_path, address, {"mixture": {"weights": {"a": 1}}} if mixed else {})
    assert nodes[0]["local"] != nodes[1]["local"]
    for epoch in range(2):
        served = [i for node in nodes for batch in node["epochs"][epoch] for i in batch]
        assert sorted(served) == sorted(zoo.sample(i)["id"] for i in range(SIZE))
        assert len(nodes[0]["epochs"][epoch]) == len(nodes[1]["epochs"][epoch]) == SIZE // 8
    # Each fetches its own half, and at most the shards that the halves share.
    count = len(list(folder.glob("shard.*")))
    copies = [set(node["copies"]) for node in nodes]
    assert len(copies[0] | copies[1]) == count
    assert len(copies[0] & copies[1]) <= 1
