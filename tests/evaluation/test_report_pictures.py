"""Pictures and analyses in ``report.html``: small copies carried once, and numbers of any form as tables."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin.evaluation.records import Item
from opsin.evaluation.report import analyses
from opsin.evaluation.report.thumbnails import SIDE, Thumbnails, thumbnail
from opsin.evaluation.scorers.base import Measure, share
from opsin.models.errors import UserError

from report_pages import Page, Reader, in_turn, scene_items


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """Noise, the worst case, with metadata."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_copies_are_small_and_small_pictures_exact() -> None:
    photo = thumbnail(jpeg(1600, 800))
    assert opened(photo.uri).size == photo.size == (SIDE, SIDE // 2)
    assert (photo.shown_as, photo.original) == ("photo", (1600, 800))
    assert len(photo.uri) < 60_000
    assert "where it was taken" not in base64.b64decode(photo.uri.split(",", 1)[1]).decode("latin-1")
    scene = scene_items("uniform", 1)[0].pictures[0]()
    small = thumbnail(scene)
    assert (small.shown_as, small.size, small.original) == ("pixels", (192, 192), (64, 64))
    with Image.open(io.BytesIO(scene)) as original:
        assert np.array_equal(np.asarray(opened(small.uri)), np.asarray(original.convert("RGB")))
    with pytest.raises(UserError, match="picture cannot be read"):
        thumbnail(b"no picture")


def test_a_picture_is_carried_once_however_often_it_is_asked_about(tmp_path: Path) -> None:
    one, other = jpeg(300, 200, 1), jpeg(300, 200, 2)
    assert [Thumbnails().number(data) for data in (one, other)] == [0, 0]
    items = [
        Item(f"{at}", "<image><image>\nwhich?", ((lambda: one), (lambda: other)), "first") for at in range(5)
    ]
    text = Page({"two": ("3d", items, in_turn)}).write(tmp_path / "r.html")
    assert text.count("data:image/") == 2
    assert text.count('data-same="picture-0"') == text.count('data-same="picture-1"') == 4
    assert "[picture\u00a01][picture\u00a02]" in text


def test_what_cannot_be_shown_is_said_on_its_card(tmp_path: Path) -> None:
    items = [Item("a", "<image>\nq", (lambda: b"no picture",), "yes"), Item("b", "q", (), "no")]
    made = Page({"s": ("general", items, lambda at, item: "\ud800 \x00 " + "long " * 300)})
    made.records[1]["error"] = "picture 0: truncated"
    text = made.write(tmp_path / "r.html")
    Reader(text)
    assert "No picture: picture cannot be read" in text
    assert "not asked: picture 0: truncated" in text
    assert "more letters)" in text
    assert "� �" in text and "\x00" not in text


def test_visual_contribution_stands_beside_accuracy_in_the_order_it_came() -> None:
    def kind(contribution: float, accuracy: list[bool]) -> dict[str, Any]:
        nats = Measure(contribution, len(accuracy), 0.1, "nats").as_dict()
        return {"contribution": nats, "accuracy": share(accuracy).as_dict()}

    found = {
        "by_kind": {
            "colour": kind(0.2, [True]),
            "count": kind(1.9, [False] * 4),
            "all": kind(1.0, [True, False]),
        }
    }
    png = io.BytesIO()
    Image.new("RGB", (3, 3)).save(png, "PNG")
    text = str(analyses.section(("visual_contribution", found, png.getvalue())))
    read = Reader(text)
    assert read.rows[0] == ["Kind", "accuracy", "contribution", "n"]
    assert [row[0] for row in read.rows[1:]] == ["colour", "count", "all"]
    assert read.row("count") == ["count", ".00 ±.00", "1.90 ±.10 nats", "4"]
    assert "ranks no model" in text
    assert opened(text.split('src="')[1].split('"')[0]).size == (3, 3)
    alone = {"contribution": Measure(1.0, 4, 0.1, "nats").as_dict()}
    assert "was not measured here" in str(analyses.section(("contribution", alone, None)))


def test_analyses_of_any_form_become_tables() -> None:
    measure = Measure(0.5, 8, 0.1).as_dict()
    found = {
        "gain": 0.25, "gain_95": 0.196, "n": 9, "note": None, "on": True, "times": list(range(30)),
        "by_layer": {"mass": [measure] * 20, "pointing": [measure] * 20},
        "runs": [{"seed": 1, "loss": 2.5}, {"seed": 2, "loss": 123.45}],
        "deep": {"er": {"x": {"y": {"z": 1}}}}, "empty": {},
    }  # fmt: skip
    text = "".join(analyses.tables("probe", found))
    read = Reader(text)
    assert read.row("gain") == ["gain", ".25 ±.10", ".05 to .45", "9"]
    assert "note: –; on: yes; times: 0, 1, 2" in text
    assert "15 … (30 in all)</p>" in text
    assert ["Layer", "mass", "pointing", "n"] in read.rows
    assert ["20", ".50 ±.10", ".50 ±.10", "8"] in read.rows
    assert read.tags["details"] == 1  # twenty layers are folded up
    assert ["2", "2", "123.5"] in read.rows
    assert read.rows[-2:] == [["X", "z"], ["y", "1"]]  # the mappings around it are in the caption


def test_cases_become_rows_and_words_their_names() -> None:
    measure = Measure(0.5, 8, 0.1)
    crossed = {
        f"{what}/{case}": measure.as_dict() for case in ("image", "other") for what in ("nats", "accuracy")
    }
    found = {
        "questions": 8, "skipped": {}, "measures": crossed, "by_kind": {"colour": crossed, "size": crossed},
        "read_outs": [
            {"site": site, "attribute": "colour", **measure.as_dict(), "shuffled": 0.25} for site in ("tower", "1")
        ],
        "tasks": {"pope": {"n": 8, "measures": {"f1": measure.as_dict()}}},
    }  # fmt: skip
    text = str(analyses.section(("mine", found, None)))
    assert "ranks no model" not in text
    read = Reader(text)
    assert read.row("Case") == ["Case", "accuracy", "nats", "n"]
    assert read.row("other") == ["other", ".50 ±.10", ".50 ±.10", "8"]
    assert read.row("Kind, case") == ["Kind, case", "accuracy", "nats", "n"]
    assert read.row("size, image") == ["size, image", ".50 ±.10", ".50 ±.10", "8"]
    assert read.row("Site, attribute") == ["Site, attribute", "value", "shuffled", "n"]
    assert read.row("tower") == ["tower, colour", ".50 ±.10", ".250", "8"]
    assert read.row("f1") == ["f1", ".50 ±.10", ".30 to .70", "8"]
    assert not any(row[0] == "skipped" for row in read.rows)
    assert "ranks no model" in str(analyses.section(("mine", {"vc/other": measure.as_dict()}, None)))
