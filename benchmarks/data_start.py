"""Seconds until an epoch can begin, or go on in its middle, for 10,000 to 10,000,000 samples; and a mixture's quotas.

``python benchmarks/data_start.py [--quick]``. Measured: who gets which sample (one process a machine computes it for
8 ranks with 8 workers), of one dataset and of three streams mixed by a schedule, beside stock Streaming's; opening
a dataset of as many samples (index, checks; its shards are not there and not looked at); the quotas of 1,000,000 steps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import report
from streaming.base.batching.random import generate_work_random_batching as stock_work
from streaming.base.world import World

from opsin.data.mixture import Mixture, scheduled_work
from opsin.data.partition import exact_work
from opsin.data.schedule import Schedule
from opsin.data.schema import COLUMNS

A_SHARD, RANKS, WORKERS, BATCH = 1000, 8, 8, 16


def like(size: int, streams: int) -> Any:
    """What the arrangements ask a dataset of so many samples."""
    names = [f"s{i}" for i in range(streams)]
    each = size // streams // A_SHARD * A_SHARD or A_SHARD
    shards = np.full(each // A_SHARD * streams, A_SHARD, np.int64)
    per_stream = np.full(streams, each, np.int64)
    weights = [(0, {names[0]: 1.0}), (100, dict.fromkeys(names, 1.0))]
    return SimpleNamespace(
        mixture=Mixture(
            names, weights, sizes=per_stream.tolist(), global_batch=RANKS * BATCH,
            epoch_size=each * streams // (RANKS * BATCH) * (RANKS * BATCH),
        ), stream_names=names, samples_per_shard=shards,
        shards_per_stream=np.full(streams, each // A_SHARD), samples_per_stream=per_stream,
        shard_offset_per_stream=np.arange(streams) * (each // A_SHARD),
        sample_offset_per_stream=np.arange(streams) * each, num_canonical_nodes=1, shuffle=True, shuffle_algo="py1e",
        shuffle_seed=1, shuffle_block_size=1 << 18, batch_size=BATCH, partition_algo="relaxed", tail="fill",
        initial_physical_nodes=None, epoch_size=each * streams // (RANKS * BATCH) * (RANKS * BATCH),
        resample_streams=lambda epoch: (shards, np.arange(each * streams)),
    )  # fmt: skip


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def opening(size: int) -> float:
    """Seconds to open a dataset of so many samples by its index."""
    from opsin.data import streaming

    with tempfile.TemporaryDirectory() as folder:
        names = list(COLUMNS)
        shards = [
            {
                "column_encodings": list(COLUMNS.values()), "column_names": names, "column_sizes": [None] * len(names),
                "compression": None, "format": "mds", "hashes": ["xxh64"], "samples": A_SHARD, "size_limit": 1 << 24,
                "raw_data": {"basename": f"shard.{i:05}.mds", "bytes": 10, "hashes": {"xxh64": "0" * 16}},
                "version": 2, "zip_data": None,
            }
            for i in range(size // A_SHARD)
        ]  # fmt: skip
        (Path(folder) / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
        for i in range(size // A_SHARD):
            (Path(folder) / f"shard.{i:05}.mds").write_bytes(bytes(10))
        began = time.perf_counter()
        streaming.StreamingVLMDataset(remote=folder, batch_size=BATCH, shuffle=True)
        return time.perf_counter() - began


def main() -> None:
    options = report.parser(__doc__, ("all",)).parse_args()
    report.quiet()
    sizes = [10**4, 10**5] if options.quick else [10**4, 10**5, 10**6, 10**7]
    world = World(1, RANKS, WORKERS, 0)
    body: dict[str, Any] = {"environment": report.environment("cpu"), "sizes": {}}
    rows = []
    for size in sizes:
        repeats = 3
        one, three = like(size, 1), like(size, 3)
        half = size // 2 // (RANKS * BATCH) * (RANKS * BATCH)
        found = {
            "opsin": seconds(lambda d=one: exact_work(d, world, 0, 0), repeats),
            "opsin_resumed": seconds(lambda d=one, h=half: exact_work(d, world, 0, h), repeats),
            "stock": seconds(lambda d=one: stock_work(d, world, 0, 0), repeats),
            "stock_resumed": seconds(lambda d=one, h=half: stock_work(d, world, 0, h), repeats),
            "mixture": seconds(lambda d=three: scheduled_work(d, world, 0, 0), repeats),
            "mixture_resumed": seconds(lambda d=three, h=half: scheduled_work(d, world, 1, h), repeats),
            "opening": opening(size),
        }
        body["sizes"][size] = found
        rows.append((f"{size:,}", *(f"{s:.3f}" for s in found.values())))
    columns = ("samples", "epoch", "at half", "stock", "at half", "mixture", "at half", "opening")
    report.table("seconds until an epoch can begin", columns, rows)
    body["quotas"], rows = {}, []
    steps = np.arange(10**6 + 1, dtype=np.int64) * RANKS * BATCH
    for streams in (2, 3, 8):
        for ramp in ("step", "linear"):
            weights = np.random.default_rng(0).random((4, streams)) + 0.01
            schedule = Schedule([0, 2 * 10**7, 5 * 10**7, 9 * 10**7], weights.tolist(), ramp)
            took = seconds(lambda s=schedule: s.counts(steps), 3)
            body["quotas"][f"{streams} streams, {ramp}"] = took
            rows.append((f"{streams} streams, {ramp}", f"{took:.2f}"))
    report.table("quotas of 1,000,000 steps", ("schedule of 4 phases", "seconds"), rows)
    report.save("data_start", options.quick, body)


if __name__ == "__main__":
    main()
