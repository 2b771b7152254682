"""``opsin data split-vift`` as it is typed: from a file, a folder or a bucket, what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from streaming import LocalDataset

from opsin.algorithms.vift import ViFT
from opsin.data import scenes
from opsin.data.convert import split_vift
from opsin.data.streaming import StreamingVLMDataset

import runs
from sources import files

pytestmark = pytest.mark.usefixtures("own_cache")


def turns(*said: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": words} for i, words in enumerate(said)]


@pytest.fixture
def llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A LLaVA file and its pictures; the words that name them. The test runs in their folder."""
    monkeypatch.chdir(tmp_path)
    talks = [
        ("a.png", turns("<image>", "A grey square.")),
        (
            "b.png",
            turns("<image>\nDescribe the picture in detail.", "Noise, in all greys.", "And left?", "More."),
        ),
        ("b.png", turns("Say a word about it.", "Noise.")),  # its mark goes to the front
        ("c.png", turns("<image>\nWhat colour is the wall?\nAnswer shortly.", "Grey.")),
        (
            "c.png",
            turns("<image>\nWho is it?\nAnswer shortly.", "Nobody.", "Describe the picture.", "A wall."),
        ),
        ("", turns("Name a prime number.", "Seven is a prime number.")),
        ("", turns("Hello.", "Hello!", "And two more?", "Eleven and thirteen.")),
        ("", turns("Hello.")),
    ]
    Path("pictures").mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        Image.effect_noise((24, 24), i).save(Path("pictures") / name)
    samples = [{"id": str(i), "image": name, "conversations": talk} for i, (name, talk) in enumerate(talks)]
    Path("llava.json").write_text(json.dumps(samples))
    return ("llava.json", "--images", "pictures")


SAID = """\
8 samples read: 2 captions, 2 text-only instructions, 4 dropped
dropped: 2 specific question, 1 nothing generic before a later exchange, 1 unusable (conversation)
first unusable: sample 7 (id '7'): 1 turns are no sequence of question and answer
exchanges dropped: 1 of samples that give a caption, 4 of dropped samples
words in answers: 7 of captions, 9 of text (1 : 1.29)
most frequent sentences of first turns of dropped samples with pictures (for --prompts):
  2  answer shortly
  1  say a word about it
  1  what colour is the wall
  1  who is it
as streams of a run, in natural proportion:

train_loader:
  dataset:
    streams:
      captions: {remote: vift/captions, kind: caption}
      text: {remote: vift/text, kind: text}
    mixture:
      weights: {captions: 2, text: 2}

the same in numbers: vift/split.json
"""


def test_a_llava_file(
    llava: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, said, error = runs.typed(monkeypatch, capsys, "split-vift", *llava, "vift")
    assert (code, error) == (0, "") and said.lstrip() == SAID
    pasted: dict[str, Any] = yaml.safe_load(said[said.index("train_loader:") : said.index("the same in")])
    options = pasted["train_loader"]["dataset"]
    dataset = StreamingVLMDataset(**options, batch_size=2, shuffle=False)
    assert [int(n) for n in dataset.samples_per_stream] == [2, 2] and dataset.stream_kinds == [
        "caption",
        "text",
    ]
    assert json.loads(Path("vift/split.json").read_text())["dropped"]["specific question"] == 2
    # What is whole is left alone, and the report is made again.
    before = files(Path("vift"))
    code, said, _ = runs.typed(monkeypatch, capsys, "split-vift", *llava, "vift", "--workers", "1")
    there = "vift: 2 samples of captions are there already\nvift: 2 samples of text are there already\n"
    assert code == 0 and there in said and said.endswith(SAID) and files(Path("vift")) == before
    # The sentences that the report shows, as a file.
    Path("prompts.txt").write_text("Say a word about it.\n")
    words = ("split-vift", *llava, "more", "--prompts", "prompts.txt", "--caption-prompt", "keep")
    code, said, _ = runs.typed(monkeypatch, capsys, *words)
    assert code == 0 and said.lstrip().startswith("8 samples read: 3 captions")
    kept = [sample["conversations"][0]["value"] for sample in LocalDataset("more/captions")]
    assert kept == [
        "<image>", "<image>\nDescribe the picture in detail.", "<image>\nSay a word about it."
    ]  # fmt: skip
    pasted = yaml.safe_load(said[said.index("train_loader:") : said.index("the same in")])
    ViFT(**pasted["algorithms"]["vift"])
    assert pasted["algorithms"]["vift"]["caption_prompts"] == [
        "describe the picture in detail",
        "say a word about it",
    ]
    code, said, _ = runs.typed(monkeypatch, capsys, *words[:4], "few", "--prompts-only")
    assert code == 0 and said.lstrip().startswith("8 samples read: 1 captions")


def test_from_a_bucket_to_a_bucket(
    s3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = scenes.SceneConfig(caption_prompts=("Describe the picture.", "What do you see?"))
    scenes.write(
        "s3://data/in", config=config, seed=1, split="train", stream="caption", samples=40, size_limit=20_000
    )
    monkeypatch.setattr(split_vift.split, "__kwdefaults__", {**(split_vift.split.__kwdefaults__ or {}), "size_limit": 20_000})  # fmt: skip
    source, out = split_vift.open_samples("s3://data/in", None, "s3://data/out"), "s3://data/out"

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("captions", 30):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split_vift.split(source, out, split_vift.Rule(), progress=stop)
    assert not (s3 / "data/out/captions/index.json").exists()
    typed = ("split-vift", "s3://data/in", out, "--workers", "1")
    code, said, error = runs.typed(monkeypatch, capsys, *typed)
    assert code == 0, error
    assert "samples of captions are there already" in said
    assert "there is no text-only instruction, so no folder for it" in said
    assert "captions: {remote: 's3://data/out/captions', kind: caption}" in said and "mixture" not in said
    assert not (s3 / "data/out/text").exists() and (s3 / "data/out/split.json").is_file()
    code, said, error = runs.typed(monkeypatch, capsys, "split-vift", "s3://data/in", str(tmp_path / "here"))
    assert code == 0, error
    assert files(tmp_path / "here/captions") == files(s3 / "data/out/captions")
    assert {s["conversations"][0]["value"] for s in LocalDataset(str(tmp_path / "here/captions"))} == {
        "<image>"
    }
    before = files(s3 / "data/out")
    code, said, _ = runs.typed(monkeypatch, capsys, *typed)
    assert code == 0 and f"{out}: 40 samples of captions are there already" in said
    assert files(s3 / "data/out") == before
    for bad in ("s3://data/out", "s3://data/"):
        code, _, error = runs.typed(monkeypatch, capsys, "split-vift", "s3://data/out/captions", bad)
        assert code == 2 and "lies there; choose another folder" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("llava.json out", "llava.json: a LLaVA file needs the folder of its pictures: --images FOLDER"),
        ("llava.json out --images nowhere", "nowhere: no folder of pictures"),
        ("none.json out --images pictures", "none.json: cannot be read (No such file or directory)"),
        ("pictures out", "dataset: no MDS dataset at 'pictures' (no index.json); make one with `opsin data ...`"),
        ("nowhere out", "dataset: no MDS dataset at 'nowhere' (no index.json); make one with `opsin data ...`"),
        ("pictures out --images pictures", "--images pictures: only for a LLaVA file (.json, .jsonl); pictures is none"),
        ("pictures pictures", "pictures: the source pictures lies there; choose another folder for the split"),
        ("pictures .", ".: the source pictures lies there; choose another folder for the split"),
        ("llava.json out --images pictures --prompts none.txt", "--prompts none.txt: cannot be read (No such file or directory)"),
        ("llava.json out --images pictures --prompts empty.txt", "--prompts empty.txt: no sentence in it; write one a line"),
        ("llava.json out --images pictures --caption-prompt nine", "--caption-prompt nine: unknown; did you mean 'none'?"),
        ("specific.json out --images pictures", "no sample gives a caption (dropped: 1 specific question); the most frequent sentences of first turns with pictures: 'who is it' (1); put those that ask nothing specific into a file for --prompts"),
    ],
)  # fmt: skip
def test_bad_input(
    llava: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: str, message: str
) -> None:  # fmt: skip
    Path("empty.txt").write_text("\n\n")
    asked = {"id": 1, "image": "a.png", "conversations": turns("<image>Who is it?", "Anna.")}
    Path("specific.json").write_text(json.dumps([asked]))
    code, said, error = runs.typed(monkeypatch, capsys, "split-vift", *words.split())
    assert (code, said.strip(), error) == (2, "", f"opsin: {message}\n")
    assert not Path("out").exists()
