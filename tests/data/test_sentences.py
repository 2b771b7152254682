"""The sheet's rules for instruction sentences (l2t.md, section 4), and counting them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opsin.data.schema import stable_hash
from opsin.data.sentences import (
    SentenceCounts,
    dataset_hash,
    sentence_id,
    sentence_key,
    split_sentences,
)

import jobs
import zoo

FORMAT = "answer the question using a single word or phrase"


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        # The prompts that a frequency rule must find in the LLaVA-1.5 mixture.
        (
            "What is he holding?\nAnswer the question using a single word or phrase.",
            ["what is he holding", FORMAT],
        ),
        ("Is it red? Answer the question using a single word or phrase.", ["is it red", FORMAT]),
        (
            "Which one?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly.",
            [
                "which one",
                "a. a cat",
                "b. a dog",
                "answer with the option's letter from the given choices directly",
            ],
        ),
        # A colon with a space: the phrase repeats, what stands behind it does not.
        (
            "Please provide a short description for this region: [0.1, 0.25, 0.5, 0.9]",
            ["please provide a short description for this region", "[0.1, 0.25, 0.5, 0.9]"],
        ),
        ("Read the ratio 4:3 aloud.", ["read the ratio 4:3 aloud"]),
        # Inside numbers, boxes and labels nothing ends.
        ("It costs 3.50 euros. Right?", ["it costs 3.50 euros", "right"]),
        ("Look at [0., 1., 0.5, 1.] again.", ["look at [0., 1., 0.5, 1.] again"]),
        ("(A. red or (B. blue?", ["(a. red or (b. blue"]),
        ("1. Look. 2. Answer.", ["1. look", "2. answer"]),
        ("Visit example.com now!", ["visit example.com now"]),
        # Several marks, closing quotes, full-width forms, line breaks.
        ("Really?! Yes... no", ["really", "yes", "no"]),
        ('He said "stop." Why?', ['he said "stop', "why"]),
        ("これは何？答えて。はい", ["これは何", "答えて", "はい"]),
        ("one\n\n\ntwo\r\nthree", ["one", "two", "three"]),
        ("\nWhat is it?", ["what is it"]),
        ("What is it? ...", ["what is it"]),
        # Nothing to say.
        ("", []),
        (" \n", [""]),
        ("...", [""]),
    ],
)
def test_splitting(text: str, keys: list[str]) -> None:
    assert [s.key for s in split_sentences(text)] == keys


def test_spans_map_back_to_characters() -> None:
    text = "What is it?\nAnswer briefly: [0.1, 0.2]."
    cut = [text[s.start : s.end] for s in split_sentences(text)]
    assert cut == ["What is it?", "\nAnswer briefly:", " [0.1, 0.2]."]


written = st.text(
    st.one_of(st.sampled_from(list(" \n\t.?!:。？[(\"')A1b,")), st.characters(codec="utf-8")), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(written)
@example("A. B. C")
@example("\n\n.\n\n")
@example("x.\n . \n")
def test_sentences_tile_their_text(text: str) -> None:
    sentences = split_sentences(text)
    ends = [0, *(s.end for s in sentences)]
    assert [s.start for s in sentences] == ends[:-1]
    assert ends[-1] == len(text)
    assert all(s.start < s.end for s in sentences)
    assert all(s.key for s in sentences) or len(sentences) == 1
    for s in sentences:
        if s.end < len(text):  # (the last one may have taken punctuation on board)
            assert s.key == sentence_key(text[s.start : s.end])


@settings(max_examples=60, deadline=None)
@given(written)
def test_a_key_is_a_normal_form(text: str) -> None:
    key = sentence_key(text)
    assert sentence_key(f"  {text.upper() if text.upper().casefold() == text.casefold() else text} \n") == key
    assert key == key.strip() and "\n" not in key and "  " not in key


def test_keys_and_ids() -> None:
    assert sentence_key("  Describe\tthe\n IMAGE !! ") == "describe the image"
    assert sentence_key("Straße?") == "strasse"
    assert sentence_id("") == 0
    assert sentence_id("describe the image") == stable_hash("sentence", "describe the image")


def _turns(*texts: str) -> list[dict[str, str]]:
    return [
        turn
        for text in texts
        for turn in ({"from": "human", "value": text}, {"from": "gpt", "value": "yes. no."})
    ]


def test_counts_go_once_a_turn_and_over_user_turns_only() -> None:
    counts = SentenceCounts()
    counts.add(_turns("<image>\nIs it red? Is it red? Be brief.", "Is it blue? Be brief."))
    counts.add([{"from": "system", "value": "Be brief."}, *_turns("Be brief.\n<image>")])
    assert counts.counts == Counter({"be brief": 3, "is it red": 1, "is it blue": 1})
    assert (counts.turns, counts.words) == (3, 8 + 5 + 2)


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat is it? Answer briefly.",
        "Look here: <image> What is it?",
        "<image> <image>\nWhat changed? Answer briefly.",
        "Picture 1 <image> and picture 2 <image> show what? Answer briefly.",
        "Before: <image>\nAfter: <image>\nDescribe both",
    ],
)
def test_counted_keys_are_those_that_tokens_carry(text: str) -> None:
    marks = text.count("<image>")
    sample = {**zoo.sample(1, images=marks), "conversations": _turns(text)}
    document = jobs.collator(zoo.build("llava")).encoder(sample)
    counts = SentenceCounts()
    counts.add(sample["conversations"])
    assert {int(i) for i in document.sentence_ids} - {0} == {sentence_id(k) for k in counts.counts}


def test_save_and_load(tmp_path: Path) -> None:
    counts = SentenceCounts(dataset="abc", templates=("rare template",))
    counts.add(_turns("Answer briefly. Once only", "Answer briefly. Rare template", "Größe? Größe?"))
    counts.add(_turns("Größe?"))
    path = tmp_path / "sentences.json"
    counts.save(path)
    loaded = SentenceCounts.load(path)
    assert loaded.counts == Counter({"answer briefly": 2, "grösse": 2, "rare template": 1})
    assert (loaded.turns, loaded.words) == (counts.turns, counts.words)
    assert (loaded.dataset, loaded.templates) == ("abc", ("rare template",))
    assert list(json.loads(path.read_text("utf-8"))["counts"].values()) == [2, 2, 1]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "opsin.sentences/9"}', '{"format": "opsin.sentences/1"}', "null"]
)
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "sentences.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"sentences\.json: not a sentence-count file"):
        SentenceCounts.load(path)


def test_union_counts_what_one_pass_over_both_would() -> None:
    first, second, both = SentenceCounts(dataset="x"), SentenceCounts(dataset="y"), SentenceCounts()
    for counts in (first, both):
        counts.add(_turns("One. Two.", "Two."))
    for counts in (second, both):
        counts.add(_turns("Two. Three."))
    total = first + second
    assert (total.counts, total.turns, total.words) == (both.counts, both.turns, both.words)
    assert first.counts["two"] == 2  # operands stay as they are
    assert total.dataset == (second + first).dataset not in ("", "x", "y")
    assert (first + SentenceCounts()).dataset == "x"
    assert (SentenceCounts(templates=("b", "a")) + SentenceCounts(templates=("a",))).templates == ("a", "b")


def test_a_dataset_is_named_by_its_index() -> None:
    assert dataset_hash(b"abc") == "a9993e364706816aba3e25717850c26c9cd0d89d"
