"""An instruction set split for ViFT: each rule on a small set, the guard's promise on any conversation, death at any time."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from streaming import LocalDataset

from opsin.algorithms.vift.functional import refused_documents
from opsin.algorithms.vift.prompts import caption_pool
from opsin.data import scenes
from opsin.data.chat import exchanges
from opsin.data.convert.llava import LlavaSource
from opsin.data.convert.split_vift import NOTE, REPORT, open_samples, split
from opsin.data.convert.vift_rule import CAPTIONS, TEXT, Rule, caption_of, choose, read_prompts, sentences
from opsin.data.convert.vift_source import SplitSource
from opsin.data.scenes.language import CAPTION_PROMPTS
from opsin.data.scenes.records import sample as scene
from opsin.data.schema import IMAGE_MARK, pack_images, unpack_images
from opsin.data.source import Text
from opsin.data.stored import StoredSamples
from opsin.data.streaming import StreamingVLMDataset
from opsin.data.write import SKIPPED, write_dataset
from opsin.models.errors import UserError

import jobs
import zoo
from sources import files, in_a_process

pytestmark = pytest.mark.usefixtures("own_cache")


@dataclass(frozen=True)
class Listed:
    """Samples of a list, as a source."""

    samples: list[dict[str, Any]]

    at_once = 8

    def __len__(self) -> int:
        return len(self.samples)

    def records(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        yield from self.samples[first:end]


def drawn(images: bytes) -> bytes:
    """As many pictures, which decode."""
    return pack_images([zoo.picture(i) for i, _ in enumerate(unpack_images(images))])


def stored(folder: Path, samples: list[dict[str, Any]], size_limit: int = 1 << 20) -> str:
    write_dataset(folder, Listed(samples), {"kind": "listed"}, size_limit=size_limit)
    return str(folder)


def turns(*said: str, system: str | None = None) -> list[dict[str, str]]:
    talk = [{"from": ("human", "gpt")[i % 2], "value": words} for i, words in enumerate(said)]
    return talk if system is None else [{"from": "system", "value": system}, *talk]


ALONE = {"turns": "independent", "kinds": ["colour", "caption"]}
SAMPLES: list[tuple[str, int, Any, Any]] = [  # id, number of pictures, conversation, meta
    ("alone", 1, turns("<image>", "A dog on a lawn."), {}),
    ("prompt", 1, turns("Describe the picture.\n<image>", "A red car.", "What colour is it?", "Red."), {}),
    ("system", 1, turns("<image>\nPlease describe it.", "Snow.", system="Be brief."), None),
    ("two", 2, turns("<image>\n<image>\nDescribe both pictures.", "Two cats.", "<image>And this?", "A cow."), {}),
    ("independent", 1, turns("<image>\nWhat colour is it?", "Red.", "Describe the picture.", "A red box."), ALONE),
    ("specific", 1, turns("<image>\nWhat is the man in the picture doing?", "He reads."), {}),
    ("later", 1, turns("<image>\nWho is it?", "Anna.", "Describe the picture.", "Anna, again."), {}),
    ("mixed", 1, turns("<image>\nDescribe the picture. Who is it?", "Anna."), {}),
    ("marked", 1, turns("Hello.", "Hello.", "<image>\nDescribe the picture.", "A sea."), {}),
    ("silent", 1, turns("<image>\nDescribe the picture.", " "), {}),
    ("lost", 1, turns("Describe the picture.", "A sea."), {}),
    ("cut", 1, turns("<image>\nDescribe the picture."), {}),
    ("text", 0, turns("Name a prime.", "Seven is one.", "Another?", "Eleven."), {"kinds": ["a", "b"]}),
    ("silent text", 0, turns("Name a prime.", ""), {}),
    ("wordy text", 0, turns("Describe a picture.", "It is a picture.", system="Be long."), {}),
]  # fmt: skip
SAMPLES[3] = ("two", 3, *SAMPLES[3][2:])


def records() -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "conversations": talk,
            "images": pack_images([f"{name} {i}".encode() for i in range(pictures)]),  # nobody decodes them
            "meta": meta,
        }
        for name, pictures, talk, meta in SAMPLES
    ]


def read(folder: Path) -> list[tuple[str, list[bytes], Any, Any]]:
    return [
        (s["id"], unpack_images(s["images"]), s["conversations"], s["meta"])
        for s in LocalDataset(str(folder))
    ]


def test_every_rule(tmp_path: Path) -> None:
    samples = open_samples(stored(tmp_path / "in", records()), None, str(tmp_path / "out"))
    report = split(samples, str(tmp_path / "out"), Rule())
    assert read(tmp_path / "out/captions") == [
        ("alone", [b"alone 0"], turns("<image>", "A dog on a lawn."), {}),
        ("prompt", [b"prompt 0"], turns("<image>", "A red car."), {}),
        ("system", [b"system 0"], turns("<image>", "Snow.", system="Be brief."), None),
        ("two", [b"two 0", b"two 1"], turns("<image>\n<image>", "Two cats."), {}),
        ("independent", [b"independent 0"], turns("<image>", "A red box."), {**ALONE, "kinds": ["caption"]}),
    ]
    whole = records()
    assert read(tmp_path / "out/text") == [
        (r["id"], [], r["conversations"], r["meta"]) for r in whole if r["id"] in ("text", "wordy text")
    ]
    assert report == json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["samples"] == 15
    assert report["captions"] == {
        "remote": f"{tmp_path}/out/captions", "samples": 5, "answer_words": 14, "exchanges": 5, "exchanges_dropped": 3,
    }  # fmt: skip
    assert report["text"] == {
        "remote": f"{tmp_path}/out/text", "samples": 2, "answer_words": 8, "exchanges": 3, "exchanges_dropped": 0,
    }  # fmt: skip
    assert report["dropped"] == {
        "specific question": 2,
        "unusable (no answer)": 2,
        "no picture in the first turn": 1,
        "nothing generic before a later exchange": 1,
        "unusable (conversation)": 1,
        "unusable (marks)": 1,
    }
    assert report["dropped_exchanges"] == 9
    assert report["first_unusable"] == "sample 9 (id 'silent'): unusable (no answer)"
    assert report["frequent_sentences"] == [
        {"sentence": "who is it", "samples": 2},
        {"sentence": "hello", "samples": 1},
        {"sentence": "what is the man in the picture doing", "samples": 1},
    ]
    assert report["train_loader"]["dataset"] == {
        "streams": {
            "captions": {"remote": f"{tmp_path}/out/captions", "kind": "caption"},
            "text": {"remote": f"{tmp_path}/out/text", "kind": "text"},
        },
        "mixture": {"weights": {"captions": 5, "text": 2}},
    }


def test_words_may_stay(tmp_path: Path) -> None:
    samples = StoredSamples(stored(tmp_path / "in", records()))
    split(samples, str(tmp_path / "out"), Rule(caption_prompt="keep"))
    assert [talk[-2]["value"] for _, _, talk, _ in read(tmp_path / "out/captions")] == [
        "<image>",
        "Describe the picture.\n<image>",
        "<image>\nPlease describe it.",
        "<image>\n<image>\nDescribe both pictures.",
        "<image>\nDescribe the picture.",
    ]
    # The method's guard takes them all, told the words that the report names, and none that has some otherwise.
    report = json.loads((tmp_path / "out/split.json").read_text())
    names = ("roles", "document_ids", "image_ids", "sentence_ids")
    for pool, refused in ((report["caption_prompts"], 0), ((), 4)):
        dataset = StreamingVLMDataset(remote=str(tmp_path / "out/captions"), batch_size=1, shuffle=False)
        batch = jobs.collator(zoo.build("llava"))(
            [{**dataset[i], "images": drawn(dataset[i]["images"])} for i in range(5)]
        )
        found = refused_documents(**{n: batch[n] for n in names}, pool=caption_pool(pool, ""), documents=1)
        assert not batch["sample_status"].any() and int(found.sum()) == refused
    with pytest.raises(UserError, match="caption-prompt kept: unknown; did you mean 'keep'"):
        Rule(caption_prompt="kept")


def test_prompts_of_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffWHO is  it?\n\n<image>\nWhat is the man in the picture doing. Go on\n", "utf-8")
    assert read_prompts(file) == {"who is it", "what is the man in the picture doing", "go on"}
    samples = StoredSamples(stored(tmp_path / "in", records()))
    for built_in, ids in ((True, {"specific", "later", "mixed"}), (False, {"specific", "later"})):
        out = tmp_path / str(built_in)
        split(samples, str(out), Rule(read_prompts(file), built_in))
        found = {name for name, *_ in read(out / "captions")}
        assert found == ids | {"alone"} | ({"prompt", "system", "two", "independent"} if built_in else set())
    file.write_text(" \n...\n")
    for bad, message in ((file, "no sentence in it"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_prompts(bad)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="no UTF-8 text"):
        read_prompts(file)


def test_nothing_generic(tmp_path: Path) -> None:
    asked = [turns(f"<image>\n{'Who is it' if i % 3 else 'Where?'}", "Here.") for i in range(9)]
    whole = [{**records()[0], "id": str(i), "conversations": talk} for i, talk in enumerate(asked)]
    with pytest.raises(UserError) as error:
        split(StoredSamples(stored(tmp_path / "in", whole)), str(tmp_path / "out"), Rule())
    assert str(error.value) == (
        "no sample gives a caption (dropped: 9 specific question); the most frequent sentences of first turns with pictures: "
        "'who is it' (6), 'where' (3); put those that ask nothing specific into a file for --prompts"
    )
    assert not (tmp_path / "out").exists()
    only_text = StoredSamples(stored(tmp_path / "text", records()[12:13]))
    with pytest.raises(UserError, match="none has a picture"):
        split(only_text, str(tmp_path / "out"), Rule())


SAID = st.lists(
    st.sampled_from(
        [*CAPTION_PROMPTS, "Who is it?", "What colour is the sky?", "Answer shortly.", "Describe it in detail.", "7", "?", "\n"]
    ),
    max_size=3,
).map(" ".join)  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn) -> Text:
    talk, marks = [], 0
    for i in range(draw(st.integers(1, 4))):
        pieces = draw(st.lists(SAID, min_size=1, max_size=4 if i == 0 or draw(st.booleans()) else 1))
        marks += len(pieces) - 1
        talk += turns(IMAGE_MARK.join(pieces), draw(st.sampled_from(["", "Red.", f"It is {i}."])))
    if draw(st.booleans()):
        talk.insert(0, {"from": "system", "value": "Be kind."})
    if draw(st.integers(0, 9)) == 0:
        talk.pop(draw(st.integers(0, len(talk) - 1)))
    meta = draw(st.sampled_from([None, {}, {"turns": "independent"}, {"turns": "chained"}, [1]]))
    pictures = marks if draw(st.integers(0, 9)) else draw(st.integers(0, 3))
    return Text(0, "x", talk, meta, pictures)


@settings(max_examples=400, deadline=None)
@given(conversations(), st.sampled_from(["none", "keep"]), st.booleans())
def test_no_caption_asks_anything_and_no_text_has_a_picture(text: Text, keep: str, built_in: bool) -> None:
    rule = Rule(frozenset({"answer shortly"}), built_in, keep)
    choice = choose(text, rule)
    assert bool(choice.side) != bool(choice.reason)
    if choice.side == TEXT:
        assert not text.pictures and IMAGE_MARK not in json.dumps(text.conversations)
    if choice.side != CAPTIONS:
        return
    record = {
        "id": "x", "conversations": text.conversations, "meta": text.meta,
        "images": pack_images([bytes([i]) for i in range(text.pictures)]),
    }  # fmt: skip
    made = caption_of(record, choice, rule)
    before, (system, ((asked, answer),)) = exchanges(text.conversations), exchanges(made["conversations"])
    pictures = unpack_images(made["images"])
    assert pictures and asked.count(IMAGE_MARK) == len(pictures)
    assert pictures == unpack_images(record["images"])[: len(pictures)]  # in their order
    assert all(rule.generic(sentence) for sentence in sentences(asked))
    assert keep == "keep" or not asked.replace(IMAGE_MARK, "").strip()
    assert system == before[0] and answer.strip() and answer == before[1][choice.exchange][1]
    again = choose(Text(0, "x", made["conversations"], made["meta"], len(pictures)), rule)
    assert (again.side, again.exchange) == (CAPTIONS, 0)  # a split set, split again, is itself
    if choice.exchange:
        assert isinstance(text.meta, dict) and text.meta["turns"] == "independent"


def many(count: int = 60) -> list[dict[str, Any]]:
    """Scenes of three streams in turns."""
    config = scenes.SceneConfig(caption_prompts=CAPTION_PROMPTS)
    whole = [scene(config, 1, "train", i, ("caption", "vqa", "text")[i % 3]) for i in range(count)]
    return [{**record, "id": f"{i} {record['id']}"} for i, record in enumerate(whole)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stored(tmp_path_factory.mktemp("mixed") / "in", many(), size_limit=30_000)


def test_scenes_and_two_processes(tmp_path: Path, mixed: str) -> None:
    samples = StoredSamples(mixed)
    assert len(pickle.dumps(samples)) < 1000
    for workers in (0, 2):
        report = split(samples, str(tmp_path / "out"), Rule(), workers=workers, size_limit=10_000)
        (tmp_path / "out").rename(tmp_path / str(workers))
    assert files(tmp_path / "0") == files(tmp_path / "2")
    assert report["dropped"] == {"specific question": 20}
    assert (report["captions"]["samples"], report["text"]["samples"]) == (20, 20)
    source = {record["id"]: record for record in many()}
    for name, pictures, talk, meta in read(tmp_path / "0/captions"):
        given_ = source[name]
        assert talk == [{"from": "human", "value": "<image>"}, given_["conversations"][1]]
        assert pictures == unpack_images(given_["images"])
        assert meta == given_["meta"]
    for name, _, talk, meta in read(tmp_path / "0/text"):
        assert (talk, meta) == (source[name]["conversations"], source[name]["meta"])
    assert len(list((tmp_path / "0/captions").glob("*.mds"))) > 2


@pytest.mark.parametrize(
    "moment", [("read", 30), ("captions", 1), ("captions", 15), ("text", 1), ("text", 18)]
)
def test_killed_and_given_again(tmp_path: Path, mixed: str, moment: tuple[str, int]) -> None:
    def kill(what: str, done: int, total: int) -> None:
        if (what, done) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(out: str, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
        there: list[str] = []
        split(
            StoredSamples(mixed), str(tmp_path / out / "vift"), Rule(), size_limit=10_000, progress=progress,
            resumed=lambda side, count: there.append(side),
        )  # fmt: skip
        return there

    assert in_a_process(lambda: run("a", kill) and None) == -signal.SIGKILL
    resumed = run("a")
    assert ("captions" in resumed) == (moment in (("captions", 15), ("text", 1), ("text", 18)))
    assert run("b") == [] and run("b") == ["captions", "text"]  # what is whole is left alone
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.keys() == b.keys()
    for name in a:  # the report has the address in it
        assert a[name] == (b[name].replace(b"/b/vift", b"/a/vift") if name.endswith(REPORT) else b[name])


def test_another_job_or_something_else(tmp_path: Path, mixed: str) -> None:
    samples, out = StoredSamples(mixed), str(tmp_path / "out")

    def stop(what: str, done: int, total: int) -> None:
        if what == "text":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(samples, out, Rule(), progress=stop)
    with pytest.raises(
        UserError, match=r"captions: is of another job \(caption_prompt: 'none', now 'keep'\)"
    ):
        split(samples, out, Rule(caption_prompt="keep"))
    (tmp_path / "out/captions" / NOTE).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        split(samples, out, Rule())
    (tmp_path / "out/captions" / NOTE).unlink()
    with pytest.raises(UserError, match="captions: not an empty folder"):
        split(samples, out, Rule())


def test_bad_pictures_of_a_llava_file(tmp_path: Path) -> None:
    pictures, whole = tmp_path / "pictures", []
    pictures.mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(pictures / f"{i}.png")
        whole.append(
            {"id": i, "image": f"{i}.png", "conversations": turns("What do you see?", "Red " * i + "box")}
        )
    whole[1] = {"id": 1, "conversations": turns("What do you see?")}
    (pictures / "2.png").unlink()
    (tmp_path / "x.json").write_text(json.dumps(whole))
    samples, out = LlavaSource(tmp_path / "x.json", pictures), str(tmp_path / "out")
    with pytest.raises(UserError, match=r"sample 2 \(id '2'\): '2.png': no such file .* with --skip-bad"):
        split(samples, out, Rule())
    report = split(samples, out, Rule(), skip_bad=True)
    assert report["dropped"] == {"unusable (conversation)": 1, "unusable (missing picture)": 1}
    assert report["first_unusable"].startswith("sample 1 (id '1'): 1 turns are no sequence")
    assert (report["captions"]["samples"], report["captions"]["answer_words"]) == (3, 1 + 4 + 5)
    assert report["text"] == {
        "remote": None, "samples": 0, "answer_words": 0, "exchanges": 0, "exchanges_dropped": 0
    }  # fmt: skip
    assert list(report["train_loader"]["dataset"]) == ["streams"]
    assert json.loads((tmp_path / "out/captions" / SKIPPED).read_text())["position"] == 2
    assert not (tmp_path / "out/text").exists()
    again = split(samples, out, Rule(), skip_bad=True)  # from the notes alone
    assert again == report
    assert str(tmp_path) not in (tmp_path / "out/captions" / NOTE).read_text()


def test_a_worker_needs_no_streaming(mixed: str) -> None:
    """It takes seconds to import and hundreds of megabytes, in each of them."""
    source = SplitSource(StoredSamples(mixed), array("Q", [0, 3]), CAPTIONS, Rule())
    code = (
        "import pickle, sys; s = pickle.load(sys.stdin.buffer); assert len(list(s.records(0, 2))) == 2; "
        "print({'torch', 'streaming', 'composer', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True)
    assert done.stdout.decode().strip() == "set()", done.stderr.decode()
