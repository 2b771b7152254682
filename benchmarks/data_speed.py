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
from measure import in_fresh_process, quartiles

SAMPLES, BATCH, SIDE = 4096, 64, 224
READERS = ("opsin", "streaming", "webdataset", "datasets", "llava")
NAMES = {
    "opsin": "Opsin, StreamingVLMDataset",
    "streaming": "MosaicML StreamingDataset",
    "webdataset": "webdataset, tar",
    "datasets": "HF datasets, arrow",
    "llava": "LLaVA JSON + folder",
}
FROM_S3 = ("opsin", "streaming", "webdataset")
BUCKET = "bench"


def pictures(count: int) -> Iterator[dict[str, Any]]:
    """LLaVA's records with the bytes of a JPEG each, about 14 kB as photographs of that size have."""
    import io

    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (14, 14, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(fine + random.normal(0, 8, fine.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=85)
        turns = [
            {"from": "human", "value": "<image>\nWhat is to be seen?"},
            {"from": "gpt", "value": f"Number {i}."},
        ]
        yield {"id": f"{i:06}", "conversations": turns, "jpeg": file.getvalue()}


def write(root: Path, count: int) -> None:
    """The same samples in every form."""
    import datasets
    import webdataset
    from streaming import MDSWriter

    from opsin.data.schema import COLUMNS, HASHES, pack_images

    (root / "llava" / "images").mkdir(parents=True)
    for name in ("mds", "tar"):
        (root / name).mkdir()
    listed, rows = [], []
    with (
        MDSWriter(out=str(root / "mds"), columns=COLUMNS, hashes=list(HASHES), size_limit=1 << 24) as mds,
        webdataset.ShardWriter(f"{root}/tar/%05d.tar", maxsize=1 << 24, maxcount=10**9, verbose=0) as tar,
    ):
        for record in pictures(count):
            name, jpeg, turns = record["id"], record["jpeg"], record["conversations"]
            mds.write({"id": name, "conversations": turns, "images": pack_images([jpeg]), "meta": {}})
            tar.write({"__key__": name, "jpg": jpeg, "json": {"id": name, "conversations": turns}})
            (root / "llava" / "images" / f"{name}.jpg").write_bytes(jpeg)
            listed.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
            rows.append({"id": name, "conversations": turns, "jpeg": jpeg})
    (root / "llava" / "data.json").write_text(json.dumps(listed))
    datasets.Dataset.from_list(rows).save_to_disk(str(root / "arrow"))


def decode(jpeg: bytes) -> Any:
    import io

    import numpy as np
    import torch
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")))


def opened(reader: str, where: str, root: Path, bare: bool) -> Any:
    """An iterable or indexable dataset of (id, tensor, conversations); ``bare``: pictures stay encoded."""
    from opsin.data.schema import unpack_images

    made = (lambda jpeg: len(jpeg)) if bare else decode
    place = str(root) if where == "folder" else f"s3://{BUCKET}"
    cache = str(root / f"cache-{reader}-{time.time_ns()}")

    if reader == "opsin":
        from opsin.data.streaming import StreamingVLMDataset

        class Ours(StreamingVLMDataset):
            def __getitem__(self, at: int) -> Any:
                sample = super().__getitem__(at)
                return sample["id"], made(unpack_images(sample["images"])[0]), sample["conversations"]

        local = {} if where == "folder" else {"local": cache}
        return Ours(remote=f"{place}/mds", batch_size=BATCH, shuffle=True, num_canonical_nodes=1, **local)
    if reader == "streaming":
        from streaming import StreamingDataset

        class Stock(StreamingDataset):
            def __getitem__(self, at: int) -> Any:
                sample = super().__getitem__(at)
                return sample["id"], made(unpack_images(sample["images"])[0]), sample["conversations"]

        local = {"local": f"{place}/mds"} if where == "folder" else {"remote": f"{place}/mds", "local": cache}
        made_set = Stock(
            batch_size=BATCH, shuffle=True, num_canonical_nodes=1, validate_hash="xxh64", **local
        )
        for stream in made_set.streams:  # else forked workers share its connection, and hang
            if getattr(stream, "_downloader", None) is not None:
                stream._downloader.clean_up()
        return made_set
    if reader == "webdataset":
        import webdataset

        urls = sorted(str(p) for p in (root / "tar").glob("*.tar"))
        if where == "s3":
            urls = [f"pipe:curl -s {os.environ['S3_ENDPOINT_URL']}/{BUCKET}/tar/{Path(u).name}" for u in urls]
        return (
            webdataset.WebDataset(urls, shardshuffle=len(urls), seed=1)
            .shuffle(1000)
            .map(lambda s: (s["__key__"], made(s["jpg"]), json.loads(s["json"])["conversations"]))
        )
    if reader == "datasets":
        import datasets

        class Arrow:
            def __init__(self) -> None:
                self.rows = datasets.load_from_disk(str(root / "arrow"))

            def __len__(self) -> int:
                return len(self.rows)

            def __getitem__(self, at: int) -> Any:
                row = self.rows[at]
                return row["id"], made(row["jpeg"]), row["conversations"]

        return Arrow()

    class Folder:
        def __init__(self) -> None:
            self.rows = json.loads((root / "llava" / "data.json").read_text())

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, at: int) -> Any:
            row = self.rows[at]
            jpeg = (root / "llava" / "images" / row["image"]).read_bytes()
            return row["id"], made(jpeg), row["conversations"]

    return Folder()


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
