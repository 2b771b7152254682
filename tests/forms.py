"""The same few samples in every form that `opsin data convert` reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COUNT = 40


def picture(i: int, size: int = 24) -> bytes:
    """A noisy PNG, a function of ``i``."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (size, size), np.uint8)).save(file, "PNG")
    return file.getvalue()


def records(count: int = COUNT, first: int = 0) -> list[dict[str, Any]]:
    """Samples with a picture, every fifth without: id, question, answer, png."""
    return [
        {
            "id": f"s{i:03}",
            "question": f"What is number {i}?",
            "answer": f"It is {i}.",
            "png": picture(i) if i % 5 else None,
        }
        for i in range(first, first + count)
    ]


def turns(record: dict[str, Any]) -> list[dict[str, str]]:
    """LLaVA's list of a record."""
    mark = "<image>\n" if record["png"] else ""
    return [
        {"from": "human", "value": mark + record["question"]},
        {"from": "gpt", "value": record["answer"]},
    ]


def write_llava(folder: Path, samples: list[dict[str, Any]]) -> Path:
    """``folder/llava.json`` and its pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for r in samples:
        item: dict[str, Any] = {"id": r["id"], "conversations": turns(r)}
        if r["png"]:
            (folder / f"{r['id']}.png").write_bytes(r["png"])
            item["image"] = f"{r['id']}.png"
        listed.append(item)
    (folder / "llava.json").write_text(json.dumps(listed))
    return folder / "llava.json"


def write_jsonl(folder: Path, samples: list[dict[str, Any]], prefix: str = "") -> Path:
    """``folder/list.jsonl``; ``prefix``: in front of the pictures' names, which lie in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for r in samples:
        line = {k: r[k] for k in ("id", "question", "answer")}
        if r["png"]:
            (folder / f"{r['id']}.png").write_bytes(r["png"])
            line["image"] = f"{prefix}{r['id']}.png"
        lines.append(json.dumps(line))
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "list.jsonl"


def table(samples: list[dict[str, Any]]) -> pa.Table:
    """Hugging Face's columns: ``image`` is {bytes, path}, ``messages`` are OpenAI's."""
    return pa.table(
        {
            "id": [r["id"] for r in samples],
            "image": pa.array(
                [{"bytes": r["png"], "path": None} if r["png"] else None for r in samples],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "messages": [
                [
                    {
                        "role": "user",
                        "content": ([{"type": "image", "text": None}] if r["png"] else [])
                        + [{"type": "text", "text": r["question"]}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": r["answer"]}]},
                ]
                for r in samples
            ],
            "split_of": ["x"] * len(samples),
        }
    )


def write_parquet(folder: Path, samples: list[dict[str, Any]], files: int = 2, split: str = "train") -> Path:
    """``folder/data/train-0000x-of-0000n.parquet``, as the hub has them, in row groups of 7."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    step = -(-len(samples) // files)
    for i in range(files):
        part = table(samples[i * step : (i + 1) * step])
        pq.write_table(part, folder / "data" / f"{split}-{i:05}-of-{files:05}.parquet", row_group_size=7)
    return folder


def write_arrow(folder: Path, samples: list[dict[str, Any]]) -> Path:
    """What ``datasets.save_to_disk`` leaves: streams of record batches and ``state.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, names = table(samples), []
    for i, part in enumerate((whole.slice(0, 11), whole.slice(11))):
        names.append(f"data-{i:05}-of-00002.arrow")
        with (
            pa.OSFile(str(folder / names[-1]), "wb") as sink,
            pa.ipc.new_stream(sink, whole.schema) as stream,
        ):
            for batch in part.to_batches(max_chunksize=5):
                stream.write_batch(batch)
    state = {"_data_files": [{"filename": n} for n in names], "_split": "train", "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def add(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    """One member."""
    info = tarfile.TarInfo(name)
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))


def write_tars(folder: Path, samples: list[dict[str, Any]], a_tar: int = 15) -> Path:
    """``folder/0000x.tar`` of ``id.json`` and ``id.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, at in enumerate(range(0, len(samples), a_tar)):
        with tarfile.open(folder / f"{n:05}.tar", "w") as tar:
            for r in samples[at : at + a_tar]:
                body = {"id": r["id"], "conversations": turns(r)}
                add(tar, f"{r['id']}.json", json.dumps(body).encode())
                if r["png"]:
                    add(tar, f"{r['id']}.png", r["png"])
    return folder


WRITERS = {
    "llava": write_llava,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "webdataset": write_tars,
}
