"""Records of the scenes: determinism, form, closed vocabulary, messages for wrong settings."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha1

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.data.scenes import (
    CAPTION_PROMPTS,
    KINDS,
    SPLITS,
    STREAMS,
    STYLES,
    SceneConfig,
    sample,
    scene,
    template_sentences,
    vocabulary,
)
from opsin.data.scenes.language import tokens
from opsin.data.scenes.picture import encode
from opsin.data.scenes.records import MISMATCH
from opsin.data.schema import COLUMNS, IMAGE_MARK, unpack_images
from opsin.data.sentences import SentenceCounts
from opsin.models.errors import UserError

SKILL_SPLITS = ("train", "uniform", "text_skill")
CASES = [
    (split, stream)
    for split in SPLITS
    for stream in STREAMS
    if stream != "text_skill" or split in SKILL_SPLITS
]
SKILLS = ("two_hop", "negated_count")


PICTURED = ("vqa", "caption", "mismatched")
GOLDEN = {
    # sha1 of ids, texts and facts of samples 0 .. 5 of every split, seed 5, when there were five streams
    "vqa": "7d7bd96b0e7a4d9b",
    "caption": "102c593b871f8b3c",
    "text": "3844ff05435c21da",
    "text_caption": "6015133dc57f9710",
    "text_skill": "7e74ed3e947e4f6f",
}


def digest(config: SceneConfig, cases: list[tuple[str, str, int]]) -> dict[str, str]:
    hashes = {}
    for split, stream, index in cases:
        record = sample(config, 5, split, index, stream)
        text = json.dumps([record["conversations"], record["meta"]]).encode()
        hashes[f"{split}/{stream}/{index}"] = sha1(text + record["images"]).hexdigest()
    return hashes


def test_records_depend_on_nothing_but_their_arguments():
    cases = [(split, stream, index) for split, stream in CASES for index in (0, 7)]
    here = digest(SceneConfig(), cases)
    assert digest(SceneConfig(), cases[::-1]) == here
    assert len(set(here.values())) == len(here)
    code = (
        "import sys, json, importlib.util as u; s = u.spec_from_file_location('t', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "print(json.dumps(m.digest(m.SceneConfig(), json.loads(sys.argv[2]))));"
        "assert 'streaming' not in sys.modules, 'generating must not import streaming'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, json.dumps(cases[1::3])],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout).items() <= here.items()


@pytest.mark.parametrize("stream", GOLDEN)
def test_what_was_written_once_is_written_again(stream):
    config, found = SceneConfig(caption_prompts=CAPTION_PROMPTS), sha1()
    for split in [split for split, of in CASES if of == stream]:
        for index in range(6):
            record = sample(config, 5, split, index, stream)
            found.update(json.dumps([record["id"], record["conversations"], record["meta"]]).encode())
            if stream in PICTURED:  # its bytes are the encoder's; what is drawn is the scene
                drawn = encode(scene(config, 5, split, index).picture, config)
                assert unpack_images(record["images"]) == [drawn]
    assert found.hexdigest()[:16] == GOLDEN[stream]


@pytest.mark.parametrize("split", SPLITS)
def test_blind_is_vqa_without_a_picture_and_mismatched_with_that_of_another_scene(split):
    config = SceneConfig()
    for index in range(12):
        vqa, blind, other = (sample(config, 5, split, index, s) for s in ("vqa", "blind", "mismatched"))
        assert vqa["meta"] | {"stream": "blind"} == blind["meta"]
        assert vqa["meta"] | {"stream": "mismatched"} == other["meta"]
        assert other["conversations"] == vqa["conversations"]
        first, *rest = vqa["conversations"]
        assert blind["conversations"] == [
            {**first, "value": first["value"].removeprefix(f"{IMAGE_MARK}\n")},
            *rest,
        ]
        assert unpack_images(blind["images"]) == []
        far = sample(config, 5, split, index + MISMATCH, "vqa")
        assert other["images"] == far["images"] != vqa["images"]
        assert far["meta"]["fact"] == vqa["meta"]["fact"]


def test_seed_split_and_world_change_the_scene():
    config = SceneConfig()
    base = sample(config, 5, "train", 0)["meta"]["objects"]
    assert sample(config, 6, "train", 0)["meta"]["objects"] != base
    assert sample(config, 5, "uniform", 0)["meta"]["objects"] != base
    assert scene(config, 5, "train", 0).objects == scene(SceneConfig(encoding="jpeg"), 5, "train", 0).objects


@pytest.mark.parametrize(("split", "stream"), CASES)
def test_records_have_the_form_of_the_schema(split, stream):
    config = SceneConfig(caption_prompts=CAPTION_PROMPTS)
    for index in range(12):
        record = sample(config, 1, split, index, stream)
        meta, talk = record["meta"], record["conversations"]
        assert set(record) == set(COLUMNS)
        assert record["id"] == f"scenes/{split}/1/{index:06d}"
        assert json.loads(json.dumps(meta)) == meta
        assert [t["from"] for t in talk] == ["human", "gpt"] * (len(talk) // 2)
        assert len(meta["kinds"]) == len(meta["asked"]) == len(meta["prior"]) == len(talk) // 2 > 0
        pictured = stream in PICTURED
        assert len(unpack_images(record["images"])) == pictured
        assert [IMAGE_MARK in t["value"] for t in talk] == [pictured] + [False] * (len(talk) - 1)
        assert talk[0]["value"].startswith(f"{IMAGE_MARK}\n") == pictured
        assert meta["turns"] == ("chained" if stream in ("text", "text_skill") else "independent")
        if stream not in ("caption", "text_caption"):
            assert all(t["value"].endswith("? Answer briefly.") for t in talk[::2])
            assert all(
                (len(t["value"].split()) == 1 and t["value"].islower()) or t["value"].isdigit()
                for t in talk[1::2]
            )
            assert len({t["value"].split("\n")[-1] for t in talk[::2]}) == len(talk) // 2 <= config.questions


def test_twins_share_questions_and_the_picture_stands_alone_by_default():
    config = SceneConfig()
    for index in range(20):
        vqa, text = (sample(config, 1, "train", index, s) for s in ("vqa", "text"))
        assert vqa["meta"]["objects"] == text["meta"]["objects"]
        assert [t["value"].split("\n")[-1] for t in vqa["conversations"]] == [
            t["value"].split("\n")[-1] for t in text["conversations"]
        ]
        assert sample(config, 1, "train", index, "caption")["conversations"][0]["value"] == IMAGE_MARK


def test_skills_stay_in_text_until_their_own_split():
    config = SceneConfig()
    for index in range(150):
        for stream in ("vqa", "text"):
            assert not set(sample(config, 1, "train", index, stream)["meta"]["kinds"]) & set(SKILLS)
    for split, stream in (("train", "text_skill"), ("text_skill", "vqa"), ("text_skill", "text")):
        kinds = {k for i in range(60) for k in sample(config, 1, split, i, stream)["meta"]["kinds"]}
        assert kinds == set(SKILLS)
    every = SceneConfig(text_skills=())
    assert set(SKILLS) <= {k for i in range(60) for k in sample(every, 1, "train", i)["meta"]["kinds"]}


@settings(max_examples=25, deadline=None)
@given(
    split_stream=st.sampled_from(CASES),
    style=st.sampled_from(STYLES),
    index=st.integers(0, 10**9),
    seed=st.integers(0, 2**40),
    high=st.integers(2, 6),
    prompt=st.sampled_from((None, "Answer with one word.")),
    world=st.integers(0, 50),
)
def test_every_word_is_in_the_vocabulary(split_stream, style, index, seed, high, prompt, world):
    split, stream = split_stream
    config = SceneConfig(
        style=style,
        objects=(1, high),
        format_prompt=prompt,
        world=world,
        caption_prompts=("Say it.",),
        sign=0.5,
    )
    known = set(vocabulary(config))
    for i in range(index, index + 6):
        record = sample(config, seed, split, i, stream)
        for turn in record["conversations"]:
            assert set(tokens(turn["value"].replace(IMAGE_MARK, ""))) <= known


def test_vocabulary_is_small_and_sorted():
    words = vocabulary(SceneConfig())
    assert words == sorted(set(words)) and len(words) < 150
    assert "briefly" in words and "briefly" not in vocabulary(SceneConfig(format_prompt=None))


def test_template_sentences_are_those_that_occur():
    config = SceneConfig(caption_prompts=CAPTION_PROMPTS, format_prompt="Answer with one word.")
    counts = SentenceCounts()
    for index in range(40):
        for stream in ("vqa", "caption"):
            counts.add(sample(config, 1, "train", index, stream)["conversations"])
    templates = template_sentences(config)
    assert {"answer with one word", "describe the picture", "describe a picture"} <= set(templates)
    assert all(counts.counts[key] > 0 for key in templates if key != "describe a picture")
    assert "answer briefly" in template_sentences(SceneConfig())
    assert template_sentences(SceneConfig(format_prompt=None)) == tuple(
        sorted(set(templates) - {"answer with one word"})
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_alone_can_be_asked(kind, style):
    config = SceneConfig(kinds=(kind,), text_skills=(), style=style, charts=0.0, sign=0.0)
    for index in range(15):
        assert set(sample(config, 1, "train", index, "text")["meta"]["kinds"]) == {kind}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"style": "grownded"}, "style: unknown 'grownded'; did you mean 'grounded'?"),
        ({"kinds": ["color"]}, "kinds: unknown 'color'; did you mean 'colour'?"),
        ({"kinds": "colour"}, "kinds: a list is needed"),
        ({"kinds": ["two_hop"]}, "nothing to ask about a picture"),
        ({"text_skills": ["negation"]}, "text_skills: unknown 'negation'"),
        ({"encoding": "jpg"}, "did you mean 'jpeg'?"),
        ({"size": 8}, "size: 48 to 1024"),
        ({"objects": (2, 9)}, "objects: .* within 1 to 6"),
        ({"objects": (3, 2)}, "objects"),
        ({"questions": 0}, "questions: at least 1"),
        ({"held_out": 9}, "held_out: 0 to 8"),
        ({"skew": 1.5}, "skew: a probability"),
        ({"caption_prompts": ["<image> look"]}, "caption_prompts: needs words"),
        ({"format_prompt": " "}, "format_prompt: needs words"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        SceneConfig(**change)


def test_settings_from_yaml_lists_are_the_same_settings():
    assert SceneConfig(objects=[1, 3], kinds=list(KINDS)) == SceneConfig()  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian", 0, "vqa"), "split: unknown 'trian'; did you mean 'train'?"),
        (("train", 0, "vqqa"), "stream: unknown 'vqqa'; did you mean 'vqa'?"),
        (("train", -1, "vqa"), "index: 0 or above"),
        (("conflict", 0, "text_skill"), "not a stream of split 'conflict'"),
    ],
)
def test_wrong_records_are_named(arguments, message):
    split, index, stream = arguments
    with pytest.raises(UserError, match=message):
        sample(SceneConfig(), 0, split, index, stream)


def test_settings_that_leave_nothing_to_ask_are_named():
    with pytest.raises(UserError, match="comparison with"):
        sample(SceneConfig(kinds=("comparison",), objects=(1, 1)), 0, "train", 0)
    with pytest.raises(UserError, match="text_skills is empty"):
        sample(SceneConfig(text_skills=()), 0, "text_skill", 0)
    with pytest.raises(UserError, match="held_out is 0"):
        sample(SceneConfig(held_out=0), 0, "held_out_pairs", 0)
