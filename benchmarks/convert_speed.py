"""Samples and megabytes a second that data of other kinds are converted, beside other libraries' writers.

``python benchmarks/convert_speed.py [--quick]``. 1,500 JPEG pictures of 14 kB with a conversation each, in every form that
``opsin data convert`` reads; to a new folder, each run in a process of its own, variants in turns. Opsin looks at every
picture, hashes shards and can go on after a kill; the peers read the same JSON and folder and just write. Workers are
counted with the time in which they start.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What is imported here is imported again by every worker.

SAMPLES = 1500
OURS = ("llava", "parquet", "arrow", "webdataset", "jsonl", "urls")
PEERS = ("MDSWriter", "webdataset.ShardWriter", "datasets to Parquet", "datasets to Arrow")
BASE = "MDSWriter"


def write_sources(root: Path, count: int) -> None:
    """The same samples in every form."""
    import io
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq
    from data_readers import pictures

    for name in ("images", "tar", "parquet", "arrow"):
        (root / name).mkdir(parents=True)
    listed, rows = [], []
    for record in pictures(count):
        name = f"{record['id']}.jpg"
        (root / "images" / name).write_bytes(record["jpeg"])
        listed.append({"id": record["id"], "image": name, "conversations": record["conversations"]})
        rows.append({**listed[-1], "image": {"bytes": record["jpeg"], "path": name}})
    (root / "llava.json").write_text(json.dumps(listed))
    (root / "images" / "list.jsonl").write_text("".join(json.dumps(r) + "\n" for r in listed))
    table = pa.Table.from_pylist(rows)
    step = -(-count // 4)
    for i in range(4):
        part = table.slice(i * step, step)
        pq.write_table(part, root / "parquet" / f"train-{i:05}-of-00004.parquet", row_group_size=100)
        sink = pa.OSFile(str(root / "arrow" / f"train-{i:05}-of-00004.arrow"), "wb")
        with sink, pa.ipc.new_stream(sink, part.schema) as stream:
            for batch in part.to_batches(max_chunksize=100):
                stream.write_batch(batch)
        with tarfile.open(root / "tar" / f"{i:05}.tar", "w") as tar:
            for row in rows[i * step : (i + 1) * step]:
                text = json.dumps({"id": row["id"], "conversations": row["conversations"]}).encode()
                for ending, body in (("json", text), ("jpg", row["image"]["bytes"])):
                    info = tarfile.TarInfo(f"{row['id']}.{ending}")
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))


def opened(name: str, root: Path, port: int) -> Any:
    """A source of ours."""
    from opsin.data.convert.convert import open_source

    if name == "urls":
        lines = [json.loads(line) for line in (root / "images" / "list.jsonl").read_text().splitlines()]
        for line in lines:
            line["image"] = f"http://127.0.0.1:{port}/{line['image']}"
        (root / "urls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return open_source(str(root / "urls.jsonl"), private=True)
    places = {"llava": "llava.json", "webdataset": "tar", "jsonl": "images/list.jsonl"}
    images = str(root / "images") if name == "llava" else None
    return open_source(str(root / places.get(name, name)), images=images)


def records(root: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """What a peer reads: the JSON, and each picture's bytes."""
    for row in json.loads((root / "llava.json").read_text()):
        yield row, (root / "images" / row["image"]).read_bytes()


def peer(name: str, root: Path, out: Path) -> None:
    """Another library's writer, as its documentation has it."""
    if name == "MDSWriter":
        from streaming import MDSWriter

        from opsin.data.schema import COLUMNS, HASHES, pack_images

        with MDSWriter(out=str(out), columns=COLUMNS, hashes=list(HASHES), size_limit=1 << 26) as mds:
            for row, jpeg in records(root):
                turns = row["conversations"]
                mds.write(
                    {"id": row["id"], "conversations": turns, "images": pack_images([jpeg]), "meta": {}}
                )
    elif name == "webdataset.ShardWriter":
        import webdataset

        out.mkdir()
        with webdataset.ShardWriter(f"{out}/%05d.tar", maxsize=1 << 26, verbose=0) as tar:
            for row, jpeg in records(root):
                tar.write({"__key__": row["id"], "jpg": jpeg, "json": row})
    else:
        import datasets

        datasets.disable_progress_bars()
        made = datasets.Dataset.from_generator(
            lambda: ({**row, "image": {"bytes": jpeg, "path": None}} for row, jpeg in records(root)),
            cache_dir=str(out.with_name(out.name + "-cache")),
        )
        if name == "datasets to Parquet":
            out.mkdir()
            made.to_parquet(str(out / "train.parquet"))
        else:
            made.save_to_disk(str(out))


def one(name: str, workers: int, root: Path, port: int) -> dict[str, float]:
    """Convert once: seconds, CPU seconds of all processes, bytes written."""
    out = root / f"out-{time.time_ns()}"
    begun, cpu = time.perf_counter(), _cpu()
    if name in OURS:
        from opsin.data.convert.convert import convert

        convert(out, opened(name, root, port), workers=workers, max_bad=0.0)
    else:
        peer(name, root, out)
    took = {"seconds": time.perf_counter() - begun, "cpu": _cpu() - cpu}
    took["bytes"] = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    for folder in root.glob(f"{out.name}*"):
        shutil.rmtree(folder)
    return took


def in_a_fork(*arguments: Any) -> dict[str, float]:
    """:func:`one` in a process of its own that has imported everything already."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        there.send(one(*arguments))

    process = context.Process(target=work)
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """Python's own HTTP server over a folder, on loopback; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 5).close()
                break
            time.sleep(0.05)
        yield port
    finally:
        server.terminate()
        server.wait(10)


def main() -> None:
    """Measure, print, save."""
    import report
    import streaming  # noqa: F401
    from measure import quartiles

    import opsin.data.convert.convert  # noqa: F401

    options = report.parser(__doc__, ("all",), rounds=None).parse_args()
    report.quiet()
    try:
        import datasets  # noqa: F401
        import webdataset  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'opsin[bench]'") from error
    rounds = options.rounds or (1 if options.quick else 3)
    count = 200 if options.quick else SAMPLES
    variants = [(name, workers) for name in OURS for workers in (0, 2)] + [(name, 0) for name in PEERS]
    found: dict[tuple[str, int], list[dict[str, float]]] = {v: [] for v in variants}
    body: dict[str, Any] = {"environment": report.environment("cpu"), "samples": count, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_sources(root, count)
        body["source_MB"] = sum(f.stat().st_size for f in (root / "images").iterdir()) / 1e6
        with served(root / "images") as port:
            for number in range(rounds):
                for name, workers in variants if number % 2 == 0 else variants[::-1]:
                    found[name, workers].append(in_a_fork(name, workers, root, port))
    body["variants"], rows = {}, []
    for (name, workers), runs in found.items():
        against = [a["cpu"] / b["cpu"] for a, b in zip(runs, found[BASE, 0], strict=True)]
        low, middle, high = quartiles(against)
        told = {
            "samples_a_second": statistics.median(count / run["seconds"] for run in runs),
            "MB_a_second": statistics.median(run["bytes"] / 1e6 / run["seconds"] for run in runs),
            "cpu_ms_a_sample": statistics.median(1000 * run["cpu"] / count for run in runs),
            "cpu_against_MDSWriter": middle,
            "quartiles": [low, high],
            "runs": runs,
        }
        who = f"opsin, {name}, {workers or 1} process{'es' if workers else ''}" if name in OURS else name
        body["variants"][who] = told
        rows.append(
            (
                who,
                f"{told['samples_a_second']:,.0f}",
                f"{told['MB_a_second']:.1f}",
                f"{told['cpu_ms_a_sample']:.2f}",
                f"{middle:.2f} ({low:.2f} .. {high:.2f})",
            )
        )
    columns = ("writer", "samples/s", "MB/s", "CPU ms a sample", "CPU against MDSWriter")
    report.table(f"{count} samples to a folder, medians of {rounds} rounds", columns, rows)
    report.save("convert_speed", options.quick, body)


if __name__ == "__main__":
    main()
