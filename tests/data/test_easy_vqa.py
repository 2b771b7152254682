from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from opsin.data.convert import easy_vqa
from opsin.data.schema import COLUMNS, HASHES, unpack_images
from opsin.data.sentences import SentenceCounts
from opsin.models.errors import UserError

needs_package = pytest.mark.skipif(find_spec("easy_vqa") is None, reason="extra 'real' is not installed")

COUNTS = {
    "train": (4000, {"colour": 5166, "shape": 5002, "yesno": 28407}),
    "test": (1000, {"colour": 1280, "shape": 1257, "yesno": 7136}),
}


@needs_package
@pytest.mark.parametrize("split", easy_vqa.SPLITS)
def test_every_picture_and_question(split: str):
    pictures, kinds = COUNTS[split]
    records = list(easy_vqa.read(split))
    assert len({r["id"] for r in records}) == len(records) == pictures
    assert Counter(k for r in records for k in r["meta"]["kinds"]) == kinds
    assert sum(kinds.values()) == {"train": 38575, "test": 9673}[split]
    for record in records:
        assert set(record) == set(COLUMNS)
        turns = record["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * len(record["meta"]["kinds"])
        assert [t["value"].count("<image>") for t in turns] == [1] + [0] * (len(turns) - 1)


@needs_package
def test_one_record():
    record = next(easy_vqa.read("train"))
    assert record["id"] == "easy-vqa-train-0000"
    assert record["conversations"][:4] == [
        {"from": "human", "value": "<image>\nwhat is the blue shape?"},
        {"from": "gpt", "value": "rectangle"},
        {"from": "human", "value": "what color is the shape?"},
        {"from": "gpt", "value": "blue"},
    ]
    meta = record["meta"]
    assert (meta["source"], meta["split"], meta["turns"]) == ("easy-vqa", "train", "independent")
    assert meta["kinds"][:3] == ["shape", "colour", "yesno"]
    (picture,) = unpack_images(record["images"])
    assert Image.open(io.BytesIO(picture)).size == (64, 64)


@needs_package
def test_fewer_yes_no_questions():
    every, some = list(easy_vqa.read("test")), list(easy_vqa.read("test", yesno=2))
    assert [r["id"] for r in some] == [r["id"] for r in every]
    for full, cut in zip(every, some, strict=True):
        kinds = Counter(full["meta"]["kinds"])
        assert Counter(cut["meta"]["kinds"]) == Counter({**kinds, "yesno": min(2, kinds["yesno"])})
        assert len(cut["conversations"]) == 2 * len(cut["meta"]["kinds"])
        assert cut["conversations"][0]["value"].startswith("<image>\n")
    assert all("yesno" not in r["meta"]["kinds"] for r in easy_vqa.read("test", yesno=0))


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what color is the triangle?", "teal", "colour"),
        ("what is the color of the shape?", "gray", "colour"),
        ("what is the red shape?", "circle", "shape"),
        ("what shape does the image contain?", "rectangle", "shape"),
        ("does the image not contain a circle?", "no", "yesno"),
        ("is no teal shape present?", "yes", "yesno"),
    ],
)
def test_kinds(question: str, answer: str, kind: str):
    assert easy_vqa.question_kind(question, answer) == kind


@pytest.mark.parametrize(
    ("question", "answer"), [("what color is the shape?", "yes"), ("how many are there?", "2")]
)
def test_unknown_questions_are_no_guess(question: str, answer: str):
    with pytest.raises(ValueError, match=r"no known form|does not answer"):
        easy_vqa.question_kind(question, answer)


def test_no_such_split():
    with pytest.raises(UserError, match="no split 'tests'; did you mean 'test'"):
        next(easy_vqa.read("tests"))


@needs_package
def test_written_shards(tmp_path: Path):
    from streaming import StreamingDataset

    out = tmp_path / "easy"
    assert easy_vqa.write(out, "test", yesno=1, limit=20) == 20
    index = json.loads((out / "index.json").read_text())
    assert (
        dict(zip(index["shards"][0]["column_names"], index["shards"][0]["column_encodings"], strict=True))
        == COLUMNS
    )
    assert set(index["shards"][0]["raw_data"]["hashes"]) == set(HASHES)
    dataset = StreamingDataset(local=str(out), shuffle=False, batch_size=1)
    expected = [r for r, _ in zip(easy_vqa.read("test", yesno=1), range(20), strict=False)]
    assert [dataset[i] for i in range(20)] == expected
    counts = SentenceCounts.load(out / "sentences.json")
    assert counts.turns == sum(len(r["meta"]["kinds"]) for r in expected)
    assert counts.dataset
    assert counts.counts["what color is the shape"] > 1
    with pytest.raises(UserError, match="not an empty folder"):
        easy_vqa.write(out, "test")


def test_reading_does_not_import_streaming():
    code = "import sys, opsin.data.convert.easy_vqa; assert not {'streaming', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
