"""Samples a second and CPU time a sample of Opsin's dataset beside others', from a folder and from S3.

``python benchmarks/data_speed.py [--quick]``. All read the same JPEG pictures and conversations through the same
``DataLoader`` and the same decoding. Each round reads all samples once with every reader in turn, each in a process of its
own; CPU time is that of the process, its threads and its workers, without imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import report
from data_readers import BATCH, BUCKET, decode, opened, write
from measure import in_fresh_process, quartiles

SAMPLES = 4096
READERS = ("opsin", "streaming", "webdataset", "datasets", "llava")
NAMES = {
    "opsin": "Opsin, StreamingVLMDataset",
    "mixture": "Opsin, two streams by a schedule",
    "streaming": "MosaicML StreamingDataset",
    "webdataset": "webdataset, tar",
    "datasets": "HF datasets, arrow",
    "llava": "LLaVA JSON + folder",
}
FROM_S3 = ("opsin", "streaming", "webdataset")


def cpu_seconds() -> float:
    """Of this process, its threads, and its workers that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def epoch(reader: str, where: str, root: Path, workers: int, bare: bool) -> dict[str, float]:
    """Read all samples once; this process's answer."""
    from torch.utils.data import DataLoader, IterableDataset

    dataset = opened(reader, where, root, bare)
    if reader == "webdataset" and not isinstance(dataset, IterableDataset):
        raise SystemExit("webdataset gave no iterable dataset")
    shuffle = {} if isinstance(dataset, IterableDataset) else {"shuffle": True}
    began, cpu, ids = time.perf_counter(), cpu_seconds(), set()
    loader = DataLoader(dataset, BATCH, num_workers=workers, collate_fn=list, **shuffle)
    for batch in loader:
        ids.update(sample[0] for sample in batch)
    del loader
    return {"seconds": time.perf_counter() - began, "cpu": cpu_seconds() - cpu, "samples": len(ids)}


@contextlib.contextmanager
def served(root: Path) -> Iterator[dict[str, str]]:
    """An S3 server on loopback over the folder; its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (root / "s3").mkdir(exist_ok=True)
    if not (root / "s3" / BUCKET).exists():
        (root / "s3" / BUCKET).mkdir()
        for name in ("mds", "tar"):
            shutil.copytree(root / name, root / "s3" / BUCKET / name)
    server = subprocess.Popen(
        [sys.executable, "-m", "localbucket", str(root / "s3"), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 5).close()
                break
            time.sleep(0.05)
        yield {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
    finally:
        server.terminate()
        server.wait(10)


WAYS = {
    "folder": {"bare": (0, True), "decoded": (0, False), "workers": (2, False)},
    "s3": {"s3": (2, False)},
}
"""Where the data lie -> way of reading -> workers, and whether pictures stay encoded."""
TITLES = {
    "bare": "from a folder, no workers, pictures stay encoded",
    "decoded": "from a folder, no workers, decoded",
    "workers": "from a folder, 2 workers, decoded",
    "s3": "from S3 with an empty cache, 2 workers, decoded",
}


def compare(root: Path, where: str, readers: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Rounds in turns: of each way of reading medians, and ratios to stock Streaming of the same round."""
    found: dict[str, list[dict[str, Any]]] = {reader: [] for reader in readers}
    for number in range(rounds):
        for reader in readers if number % 2 == 0 else readers[::-1]:
            found[reader].append(in_fresh_process(__file__, ["--epoch", reader, where, str(root)]))
    return {
        way: _summary({reader: [run[way] for run in runs] for reader, runs in found.items()})
        for way in WAYS[where]
    }


def _summary(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    out = {}
    for reader, runs in found.items():
        cpu = [1000 * run["cpu"] / run["samples"] for run in runs]
        against = [a["cpu"] / b["cpu"] for a, b in zip(runs, found["streaming"], strict=True)]
        low, middle, high = quartiles(against)
        out[reader] = {
            "samples": sorted({run["samples"] for run in runs}),
            "samples_a_second": statistics.median(run["samples"] / run["seconds"] for run in runs),
            "cpu_ms_a_sample": statistics.median(cpu),
            "cpu_ms_quartiles": list(quartiles(cpu)[::2]),
            "cpu_against_streaming": middle,
            "quartiles": [low, high],
        }
    return out


def profiled(reader: str, root: Path) -> str:
    """Where the time of reading without decoding goes, on the main thread: the twelve dearest functions."""
    import cProfile
    import io
    import pstats

    epoch(reader, "folder", root, 0, True)  # files are warm then
    profile = cProfile.Profile()
    profile.runcall(epoch, reader, "folder", root, 0, True)
    text = io.StringIO()
    pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(12)
    return f"{NAMES[reader]}\n{text.getvalue().strip()}\n"


def decoding(root: Path) -> float:
    """CPU milliseconds that decoding alone takes."""
    files = [p.read_bytes() for p in sorted((root / "llava" / "images").iterdir())[:1000]]
    began = time.process_time()
    for file in files:
        decode(file)
    return (time.process_time() - began) / len(files) * 1000


def shown(title: str, found: dict[str, Any]) -> None:
    """One comparison as a table."""
    rows = [
        (
            NAMES[reader],
            f"{r['samples_a_second']:,.0f}",
            f"{r['cpu_ms_a_sample']:.3f}",
            f"{r['cpu_against_streaming']:.2f} ({r['quartiles'][0]:.2f} .. {r['quartiles'][1]:.2f})",
        )
        for reader, r in found.items()
    ]
    report.table(title, ("reader", "samples/s", "CPU ms a sample", "CPU against stock Streaming"), rows)


def main() -> None:
    if "--epoch" in sys.argv:
        reader, where, root = sys.argv[sys.argv.index("--epoch") + 1 :]
        ways = WAYS[where].items()
        print(json.dumps({name: epoch(reader, where, Path(root), *way) for name, way in ways}))
        return
    if "--profiled" in sys.argv:
        reader, root = sys.argv[sys.argv.index("--profiled") + 1 :]
        print(json.dumps(profiled(reader, Path(root))))
        return
    parser = report.parser(__doc__, ("all",), rounds=None)
    parser.add_argument(
        "--profile", action="store_true", help="also: where Opsin's and stock Streaming's time goes"
    )
    options = parser.parse_args()
    report.quiet()
    try:
        import datasets  # noqa: F401
        import webdataset  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'opsin[bench]'") from error
    rounds = options.rounds or (2 if options.quick else 5)
    body: dict[str, Any] = {"environment": report.environment("cpu"), "samples": SAMPLES, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, 512 if options.quick else SAMPLES)
        body["decoding_ms"] = decoding(root)
        report.console().print(f"decoding alone: {body['decoding_ms']:.3f} ms of CPU a sample")
        body["ways"] = compare(root, "folder", READERS, rounds)
        if options.profile:
            told = [in_fresh_process(__file__, ["--profiled", r, str(root)]) for r in ("opsin", "streaming")]
            report.path_of("data_speed", options.quick, ".profile.txt").write_text("\n".join(map(str, told)))
        with served(root) as environment:
            os.environ.update(environment)
            body["ways"].update(compare(root, "s3", FROM_S3, rounds))
        for way, found in body["ways"].items():
            shown(TITLES[way], found)
    report.save("data_speed", options.quick, body)


if __name__ == "__main__":
    main()
