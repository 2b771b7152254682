"""The same pictures and conversations in every form that ``data_speed.py`` compares, and who reads them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH, SIDE = 64, 224
"""Samples a batch, pixels a side."""
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


def write_mds(root: Path, count: int) -> None:
    """The samples as MDS shards alone."""
    from streaming import MDSWriter

    from opsin.data.schema import COLUMNS, HASHES, pack_images

    root.mkdir(parents=True, exist_ok=True)
    with MDSWriter(out=str(root / "mds"), columns=COLUMNS, hashes=list(HASHES), size_limit=1 << 24) as mds:
        for record in pictures(count):
            row = {"id": record["id"], "conversations": record["conversations"]}
            mds.write({**row, "images": pack_images([record["jpeg"]]), "meta": {}})


def write(root: Path, count: int) -> None:
    """The same samples in every form."""
    import datasets
    import webdataset

    write_mds(root, count)
    (root / "llava" / "images").mkdir(parents=True)
    (root / "tar").mkdir()
    listed, rows = [], []
    with webdataset.ShardWriter(
        f"{root}/tar/%05d.tar", maxsize=1 << 24, maxcount=max(count // 4, 1), verbose=0
    ) as tar:
        for record in pictures(count):
            name, jpeg, turns = record["id"], record["jpeg"], record["conversations"]
            tar.write({"__key__": name, "jpg": jpeg, "json": {"id": name, "conversations": turns}})
            (root / "llava" / "images" / f"{name}.jpg").write_bytes(jpeg)
            listed.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
            rows.append({"id": name, "conversations": turns, "jpeg": jpeg})
    (root / "llava" / "data.json").write_text(json.dumps(listed))
    datasets.Dataset.from_list(rows).save_to_disk(str(root / "arrow"))


def _samples(root: Path) -> int:
    """Samples of the dataset, in whole batches."""
    shards = json.loads((root / "mds" / "index.json").read_text())["shards"]
    return sum(shard["samples"] for shard in shards) // BATCH * BATCH


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

    if reader in ("opsin", "mixture"):
        from opsin.data.streaming import StreamingVLMDataset

        class Ours(StreamingVLMDataset):
            def __getitem__(self, at: int) -> Any:
                sample = super().__getitem__(at)
                return sample["uid"], made(unpack_images(sample["images"])[0]), sample["conversations"]

        if (
            reader == "mixture"
        ):  # two streams in turns of whole batches, half of each: as many samples as one has
            streams = {name: {"remote": f"{place}/{name}"} for name in ("mds", "mds-again")}
            return Ours(
                streams=streams, batch_size=BATCH, shuffle=True, num_canonical_nodes=1, epoch_size=_samples(root),
                mixture={"weights": dict.fromkeys(streams, 1), "batches": "single"},
            )  # fmt: skip

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
