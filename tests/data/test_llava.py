"""LLaVA's JSON as a dataset: what is taken, what is refused, and in which words."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from streaming import LocalDataset

from opsin.data.convert.llava import LlavaSource, write
from opsin.data.schema import unpack_images
from opsin.data.sentences import SIDECAR, SentenceCounts
from opsin.data.write import SKIPPED
from opsin.models.errors import UserError

import runs
from sources import files

pytestmark = pytest.mark.usefixtures("own_cache")


def turns(question: str, answer: str = "A shape.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


GOOD: list[dict[str, Any]] = [
    {"id": "a", "image": "coco/a.png", "conversations": turns("<image>\nWhat is it? Be brief.")},
    {"id": "b", "conversations": turns("Größe? 😀")},
    {"id": 7, "image": ["coco/a.png", "b.jpg"], "conversations": turns("<image> and <image>?"), "model": "x"},
    {"image": "b.jpg", "conversations": turns("What is it?") + turns("And now?")},  # no mark, no id
    {"id": "a", "image": "c.webp", "conversations": turns("Describe it. <image>")},
    {"id": "a#4", "image": "", "conversations": turns("Who are you?")},
    {"id": None, "image": [], "conversations": [{"from": "system", "value": "Be kind."}, *turns("Hello.")]},
]
IDS = ["a", "b", "7", "3", "a#4#4", "a#4", "6"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    for i, name in enumerate(("coco/a.png", "b.jpg", "c.webp")):
        Image.new("RGB", (20 + i, 16), (40 * i, 90, 10)).save(folder / name)
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "coco/a.png").read_bytes()[:40])
    (folder / "folder.png").mkdir()
    return folder


def as_list(samples: list) -> str:
    return json.dumps(samples, ensure_ascii=False, indent=1)


def as_lines(samples: list) -> str:
    return "".join(json.dumps(sample) + "\r\n\n" for sample in samples)


@pytest.mark.parametrize("text", [as_list, as_lines])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_sample_is_written(
    tmp_path: Path, images: Path, text: Callable[[list], str], mark: str
) -> None:
    file = tmp_path / "llava.json"
    file.write_text(mark + text(GOOD), encoding="utf-8")
    source = LlavaSource(file, images)
    written = write(tmp_path / "out", source)
    assert (written.samples, written.skipped, source.unmarked) == (7, {}, 1)
    assert source.renamed == {3: "3", 4: "a#4#4", 6: "6"}
    stored = list(LocalDataset(str(tmp_path / "out")))
    assert [s["id"] for s in stored] == IDS
    for sample, given_ in zip(stored, GOOD, strict=True):
        names = given_.get("image") or []
        names = [names] if isinstance(names, str) else names
        assert sample["meta"] == {"source": "llava", "pictures": names}
        assert unpack_images(sample["images"]) == [(images / name).read_bytes() for name in names]
    unmarked = stored.pop(3)["conversations"]
    assert unmarked == turns("<image>\nWhat is it?") + turns("And now?")
    assert [s["conversations"] for s in stored] == [s["conversations"] for i, s in enumerate(GOOD) if i != 3]
    counts = SentenceCounts.load(tmp_path / "out" / SIDECAR)
    assert (counts.turns, counts.counts) == (5, {"what is it": 2})
    assert not (tmp_path / "out" / SKIPPED).exists()


BAD: list[tuple[Any, str, str]] = [
    ({"id": "x", "image": "none.png", "conversations": turns("<image>")}, "missing picture", "'none.png': no such file"),
    ({"id": "x", "image": "folder.png", "conversations": turns("<image>")}, "missing picture", "no such file"),
    ({"id": "x", "image": "text.png", "conversations": turns("<image>")}, "unreadable picture", "does not decode (UnidentifiedImageError: cannot identify image file)"),
    ({"id": "x", "image": "cut.png", "conversations": turns("<image>")}, "unreadable picture", "does not decode"),
    ({"id": "x", "image": "../images/b.jpg", "conversations": turns("<image>")}, "path", "'../images/b.jpg': leads out of"),
    ({"id": "x", "image": "/etc/passwd", "conversations": turns("<image>")}, "path", "leads out of the picture folder"),
    ({"id": "x", "image": "a\0b", "conversations": turns("<image>")}, "path", "leads out of"),
    ({"id": "x", "image": "b" * 5000, "conversations": turns("<image>")}, "unreadable picture", "File name too long"),
    ({"id": "x", "image": "b.jpg", "conversations": turns("<image> <image>")}, "marks", "2 <image> marks in the questions, 1 pictures"),
    ({"id": "x", "image": ["b.jpg", "b.jpg"], "conversations": turns("<image>")}, "marks", "1 <image> marks in the questions, 2 pictures"),
    ({"id": "x", "conversations": turns("<image>")}, "marks", "1 <image> marks in the questions, 0 pictures"),
    ({"id": "x", "image": "b.jpg", "conversations": turns("What?", "<image>")}, "marks", "<image> stands in an answer"),
    ({"id": "x", "image": 3, "conversations": turns("<image>")}, "image", "neither a name nor a list"),
    ({"id": "x", "image": {"b.jpg": 1}, "conversations": turns("<image>")}, "image", "neither a name nor a list"),
    ({"id": "x", "conversations": turns("What?")[:1]}, "conversation", "1 turns are no sequence"),
    ({"id": "x", "conversations": turns("What?")[::-1]}, "conversation", "turns should alternate"),
    ({"id": "x", "conversations": "What?"}, "conversation", "no list of turns"),
    ({"id": "x"}, "conversation", "0 turns"),
    ({"id": "x", "conversations": turns("\ud800")}, "text", "half of a surrogate pair"),
    ({"id": ["x"], "conversations": turns("What?")}, "id", "id is a list"),
    ([1], "conversation", "no JSON object but a list"),
    (None, "conversation", "no JSON object but a NoneType"),
]  # fmt: skip


@pytest.mark.parametrize(("sample", "reason", "message"), BAD)
def test_a_bad_sample_is_named(tmp_path: Path, images: Path, sample: Any, reason: str, message: str) -> None:
    file, out = tmp_path / "llava.json", tmp_path / "out"
    file.write_text(json.dumps([GOOD[0], sample, GOOD[1]]))
    source = LlavaSource(file, images)
    with pytest.raises(UserError) as error:
        write(out, source)
    line = str(error.value)
    assert line.startswith("sample 1") and message in line and "\n" not in line and "0x" not in line
    assert line.endswith("; mend it, or leave bad samples out with --skip-bad")
    assert not (out / "index.json").exists()
    assert out.exists() == (
        "picture" in reason
    )  # what the file alone tells is told before anything is written
    written = write(out, source, skip_bad=True)  # goes on
    assert (written.samples, written.skipped) == (2, {reason: 1})
    (named,) = map(json.loads, (out / SKIPPED).read_text().splitlines())
    assert (named["position"], named["reason"]) == (1, reason) and message.rpartition("': ")[2] in named[
        "detail"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither a JSON list of samples nor one sample a line"),
        ("id,image", "neither a JSON list"),
        ('[{"id": 1},', "no JSON list (JSONDecodeError: Expecting value"),
        ('[{"id": 1} {"id": 2}]', "no JSON list (JSONDecodeError: Expecting ',' or ']'"),
        ("[{}] 1", "no JSON list (JSONDecodeError: Extra data"),
        ('{"id": 1}\n{"id"', "line 2 is no JSON"),
        ("[" * 100000, "no JSON list (RecursionError"),
        ("[]", "no sample to write"),
    ],
)
def test_a_file_that_is_no_list_of_samples(tmp_path: Path, images: Path, text: str, message: str) -> None:
    file = tmp_path / "llava.json"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        write(tmp_path / "out", LlavaSource(file, images))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out/index.json").exists()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2), max_size=5),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)
def test_samples_are_found_again_by_their_places(
    tmp_path_factory: pytest.TempPathFactory, samples: list, indent: int | None, ascii_: bool
) -> None:
    folder = tmp_path_factory.mktemp("places")
    file = folder / "x.json"
    file.write_text(json.dumps(samples, indent=indent, ensure_ascii=ascii_), "utf-8")
    source, content = LlavaSource(file, folder), file.read_bytes()
    found = [json.loads(content[a:b]) for a, b in zip(source._starts, source._ends, strict=True)]
    assert found == samples


def test_the_command_from_a_bucket_to_mending_a_picture(
    s3: Path, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "llava.json"
    samples = [
        {"id": str(i), "image": f"{i}.png", "conversations": turns(f"<image>\nIs it {i}?")} for i in range(40)
    ]
    file.write_text(json.dumps(samples))
    for i in range(40):
        Image.effect_noise((24, 24), i).save(images / f"{i}.png")
    picture = (images / "30.png").read_bytes()
    (images / "30.png").unlink()
    typed = ("llava", str(file), str(images), "--out", "s3://data/llava", "--workers", "1")
    code, _, said = runs.typed(monkeypatch, capsys, *typed)
    assert code == 2 and said == (
        "opsin: sample 30 (id '30'): '30.png': no such file in the picture folder; mend it, or leave bad samples out "
        "with --skip-bad\n"
    )
    assert not (s3 / "data/llava/index.json").exists()
    code, said, _ = runs.typed(monkeypatch, capsys, *typed, "--skip-bad", "--limit", "32")
    assert (code, said.strip().splitlines()) == (
        0,
        [
            "31 samples in s3://data/llava, 31 user turns with pictures",
            f"1 samples left out (1 missing picture); they are named in {SKIPPED}",
        ],
    )
    assert json.loads((s3 / "data/llava" / SKIPPED).read_text())["file"] == "30.png"
    (images / "30.png").write_bytes(picture)
    here = ("llava", str(file), str(images), "--out", str(tmp_path / "here"))
    assert runs.typed(monkeypatch, capsys, *here)[0] == 0
    assert unpack_images(LocalDataset(str(tmp_path / "here"))[30]["images"]) == [picture]
    assert Image.open(io.BytesIO(picture)).size == (24, 24)
    code, _, said = runs.typed(monkeypatch, capsys, *here)
    assert code == 2 and "not an empty folder" in said
    code, _, said = runs.typed(
        monkeypatch, capsys, "llava", str(file), str(tmp_path / "nowhere"), "--out", "x"
    )
    assert code == 2 and said == f"opsin: {tmp_path}/nowhere: no folder of pictures\n"
    code, _, said = runs.typed(monkeypatch, capsys, "llava", "none.json", str(images), "--out", "x")
    assert code == 2 and said == "opsin: none.json: cannot be read (No such file or directory)\n"


def test_workers_change_nothing(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "llava.json"
    file.write_text(json.dumps([*GOOD, *(sample for sample, *_ in BAD)] * 2))
    source = LlavaSource(file, images)
    for workers in (0, 2):
        written = write(tmp_path / str(workers), source, skip_bad=True, workers=workers, size_limit=2000)
    assert written.samples == 2 * len(GOOD) and written.skipped.total() == 2 * len(BAD)
    assert files(tmp_path / "0") == files(tmp_path / "2")
    ids = [s["id"] for s in LocalDataset(str(tmp_path / "0"))]
    assert len(set(ids)) == len(ids)
