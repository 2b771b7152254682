"""Question files of the official forms with a few questions each, for tests of readers and suites."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from opsin.data.schema import IMAGE_MARK
from opsin.evaluation.records import Item, prediction
from opsin.evaluation.suites import Suite


def picture(number: int, form: str = "PNG") -> bytes:
    """A small picture, another one for each number below 256."""
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (number % 256, 100, 7)).save(out, form)
    return out.getvalue()


def made(suite: Suite) -> list[Item]:
    items = list(suite.load())
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert item.question.count(IMAGE_MARK) == len(item.pictures)
    return items


def parquet(file: Path, rows: list[dict[str, Any]], images: list[bytes | None]) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([None if b is None else {"bytes": b, "path": None} for b in images], kind)
    pq.write_table(pa.Table.from_pylist(rows).append_column("image", cells), file, row_group_size=3)


def pope_files(folder: Path) -> dict[str, Any]:
    """The original files: JSON lines, a picture shared by several questions."""
    (folder / "val2014").mkdir(parents=True)
    for i in range(2):
        (folder / "val2014" / f"COCO_{i}.jpg").write_bytes(picture(i))
    for s, split in enumerate(("random", "popular", "adversarial")):
        rows = [
            {"question_id": i, "image": f"COCO_{i // 2}.jpg", "image_id": i // 2, "text": f"Is there a {split} {i} in the image?", "label": ("yes", "no")[(i + s) % 2]}
            for i in range(4)
        ]  # fmt: skip
        (folder / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(folder), "images": str(folder / "val2014")}


def mmvp_files(folder: Path) -> None:
    (folder / "MMVP Images").mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Index", "Question", "Options", "Correct Answer"])
        for i in (1, 2, 99, 100, 279, 280):
            (folder / "MMVP Images" / f"{i}.jpg").write_bytes(picture(i))
            writer.writerow(
                [i, f"Is it {i // 2}, or not?", "(a) Open, wide (b) Closed", "(a)" if i % 2 else "(b)"]
            )


def cv_rows() -> list[dict[str, Any]]:
    """As in the benchmark's JSON lines."""
    rows = []
    for kind, source, task in (
        ("2D", "ADE20K", "Count"),
        ("2D", "COCO", "Relation"),
        ("3D", "Omni3D", "Depth"),
    ):
        for i in range(3):
            choices = [str(i), str(i + 1), "9"][: 2 + i % 2]
            listed = "\n".join(f"({letter}) {choice}" for letter, choice in zip("ABC", choices, strict=False))
            rows.append(
                {
                    "idx": len(rows), "type": kind, "task": task, "question": "How many?", "choices": choices, "answer": "(B)",
                    "prompt": f"How many? Select from the following choices.\n{listed}", "filename": f"img/{kind}/{len(rows)}.png",
                    "source": source, "target_class": None,
                }
            )  # fmt: skip
    return rows


def mmbench_file(folder: Path, **column: list[str]) -> Path:
    """Two questions with rolled copies, whose pictures are the index of the first one."""
    rows = []
    for copy in range(2):
        for i in (3, 7):
            options = [f"x{i}", 'a "quoted"\toption']
            rows.append(
                {
                    "index": i + copy * 10**6, "question": f"Which {i}?", "hint": "Look\nclosely." if i == 3 else "",
                    "A": options[copy], "B": options[1 - copy], "C": "", "D": "", "answer": "AB"[copy],
                    "category": f"cat{i}", "image": str(i) if copy else base64.b64encode(picture(i)).decode(),
                    "l2-category": "coarse", "split": "dev", **{name: values[len(rows)] for name, values in column.items()},
                }
            )  # fmt: skip
    path = folder / "MMBench_DEV_EN.tsv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def hallusion_file(folder: Path, prefix: str = "./") -> Path:
    rows = []
    for category, figure, question, seen in (
        ("VS", 0, 0, "0"),
        ("VS", 1, 0, "1"),
        ("VD", 0, 0, "1"),
        ("VD", 1, 1, "2"),
    ):
        rows.append(
            {
                "category": category, "subcategory": "chart", "visual_input": seen, "set_id": "0", "figure_id": str(figure),
                "sample_note": "n", "question_id": str(question), "question": f"Is {category} {figure}?", "gt_answer": str(figure),
                "gt_answer_details": "...", "filename": None if seen == "0" else f"{prefix}{category}/chart/0_{figure}.png",
            }
        )  # fmt: skip
        if seen != "0":
            image = folder / "hallusion_bench" / category / "chart" / f"0_{figure}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(picture(figure))
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    return folder / "HallusionBench.json"


def scored(suite: Suite, items: list[Item], answer: Callable[[Item], str]) -> dict[str, Any]:
    """Scores of some answers, by the suite's own scorer."""
    _, scores = suite.scorer.score([prediction("it", item, answer(item)) for item in items])
    return {name: measure.value for name, measure in scores.measures.items()}
