"""Facts of captions: gold captions are perfect, each slip costs exactly what it should, and nothing divides by zero."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.data.scenes import COLOURS, SHAPES, SceneConfig, sample, scene
from opsin.data.scenes.captions import describe_facts
from opsin.evaluation.scorers.base import Measure, mean
from opsin.evaluation.scorers.caption_facts import compare, measures_of, pooled, scene_of
from opsin.evaluation.scorers.caption_reading import read_caption
from opsin.evaluation.scorers.captions import SceneCaptions
from opsin.models.errors import UserError

CONFIGS = (
    SceneConfig(size=48, objects=(1, 6), sign=0.5, charts=0.2),
    SceneConfig(size=48, objects=(2, 2), sign=0, charts=0),
    SceneConfig(size=48, objects=(1, 1), kinds=("chart", "colour"), charts=0.5),
)
SPLITS = ("train", "uniform", "minimal_pairs", "held_out_pairs")


def record(output: str, meta: dict, name: str = "s/0", **extra: Any) -> dict:
    return {
        "suite": "s", "id": name, "kind": "caption", "gold": "", "choices": [], "question": "", "output": output, "meta": meta, **extra,
    }  # fmt: skip


def numbers(*records: dict) -> dict[str, Measure]:
    return SceneCaptions().score(records)[1].measures


def thing(shape: str, colour: str, size: str, x: float, depth: float = 0.3) -> dict:
    return {
        "shape": shape, "colour": colour, "size": size, "x": x, "y": 0.7, "depth": depth, "box": [0, 0, 4, 4], "pixels": 9, "visible": 9,
    }  # fmt: skip


RED, BLUE = thing("cube", "red", "small", 0.2, 0.1), thing("sphere", "blue", "large", 0.8, 0.6)
TWO = {"objects": [RED, BLUE], "sign": "cat", "chart": None}
CHART = {"objects": [], "sign": None, "chart": [{"colour": "red", "value": 3, "box": [0] * 4}, {"colour": "cyan", "value": 7, "box": [0] * 4}]}  # fmt: skip
GOLD = "There is a small red cube to the left of a large blue sphere. The sign says cat."


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(CONFIGS),
    st.sampled_from(SPLITS),
    st.integers(0, 10_000),
    st.sampled_from(("caption", "text_caption")),
)
def test_gold_captions_of_all_forms_are_perfect(
    config: SceneConfig, split: str, index: int, stream: str
) -> None:
    made = sample(config, 3, split, index, stream)
    gold = made["conversations"][1]["value"]
    marked, scores = SceneCaptions().score([record(gold, made["meta"])])
    assert marked[0]["right"] and marked[0]["parsed"]
    found = scores.measures
    perfect = ("f1", "precision", "recall", "exact")
    assert [found[name].value for name in perfect] == [1.0] * 4
    invented = ("chair_s", "chair_i", "chair_s_shape", "chair_i_shape", "unparsed")
    assert [found[name].value for name in invented] == [0.0] * 5
    assert found["recall"].n == len(made["meta"]["objects"]) + len(made["meta"]["chart"] or ())
    for name in ("relations", "counts", "signs", "sign_recall"):
        assert found[name].value in (1.0, None)
    assert (found["sign_recall"].n == 1) == (made["meta"]["sign"] is not None)
    if len(made["meta"]["objects"]) > 1:
        assert found["relations"].n == max(1, len(made["meta"]["objects"]) - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_the_description_that_stands_for_a_picture_is_perfect_too(index: int) -> None:
    meta = sample(CONFIGS[0], 3, "uniform", index, "caption")["meta"]
    words = describe_facts(random.Random(index), scene(CONFIGS[0], 3, "uniform", index))
    found = numbers(record(words, meta))
    assert found["f1"].value == 1 and found["chair_i"].value == 0 and found["exact"].value == 1


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 99), st.integers(1, 7), st.sampled_from(("colour", "shape")))
def test_one_wrong_word_costs_exactly_that(index: int, which: int, step: int, sort: str) -> None:
    config = SceneConfig(size=48, objects=(1, 6), charts=0, sign=0.3)
    made = sample(config, 3, "uniform", index, "caption")
    meta, words = made["meta"], made["conversations"][1]["value"].split(" ")
    values = COLOURS if sort == "colour" else SHAPES
    at = [i for i, word in enumerate(words) if word.strip(",.") in values]
    place = at[which % len(at)]
    old = words[place].strip(",.")
    new = values[(values.index(old) + 1 + step % (len(values) - 1)) % len(values)]
    words[place] = words[place].replace(old, new)
    changed = read_caption(" ".join(words)).things[at.index(place)]
    found = numbers(record(" ".join(words), meta))
    count = len(meta["objects"])
    # The changed one may be what another object is: then it is no invention, but that object is named once too often.
    doubles = any(
        (o["shape"], o["colour"], o["size"]) == (changed.shape, changed.colour, changed.size)
        for o in meta["objects"]
    )
    expected = (count - 1) / count
    assert [found[name].value for name in ("precision", "recall", "f1")] == pytest.approx([expected] * 3)
    assert found["precision"].n == found["recall"].n == count
    assert found["chair_i"].value == pytest.approx(0 if doubles else 1 / count)
    assert found["chair_s"].value == (0 if doubles else 1)
    new_shape = sort == "shape" and new not in [o["shape"] for o in meta["objects"]]
    assert found["chair_i_shape"].value == pytest.approx(new_shape / count)
    assert found["exact"].value == 0 and found["unparsed"].value == 0


def test_what_is_read() -> None:
    for text, reading in {
        GOLD: "small red cube; large blue sphere; 1 left 2; sign cat",
        "A picture of a large gray cone on the left. The word on the sign is map.": "large gray cone; 1 left; sign map",
        "From near to far: a small red cube, a big grey ball and a cyan cone.": (
            "small red cube; large gray sphere; cyan cone; 1 front 2; 2 front 3"
        ),
        "From right to left there are a red cube and a blue cube.": "red cube; blue cube; 1 right 2",
        "A chart with 3 bars: red 3, blue 5 and green 7.": "red bar 3; blue bar 5; green bar 7; 3 bars",
        "A bar chart: red 3 and blue: 5.": "red bar 3; blue bar 5",
        "There are 3 objects. There are two small red cubes and one cone.": "small red cube; small red cube; cone; 3 objects",
        "A red cube is behind the blue sphere. The sphere is in front of the red cube.": (
            "red cube; blue sphere; 1 behind 2; 2 front 1"
        ),
        "a small, red cube on the left of a cone in the middle": "small red cube; cone; 1 left 2; 2 middle",
        "There is no red cube here, but an object and a cylinder!": "cylinder",
        'The sign says: "stop".': "sign stop",
        "A SMALL RED CUBE": "small red cube",
        "A cat sits on a bar stool beside a box of tea.": "",
        "": "",
        "2 2 2 red red a the an <0> <1> \u00b2 :": "",
    }.items():
        assert str(read_caption(text)) == reading, text
    assert not read_caption("nothing") and read_caption("2 objects") and read_caption("a cone")


def test_relations_and_places_where_said() -> None:
    def relations(text: str) -> tuple[float | None, int]:
        found = numbers(record(text, TWO))["relations"]
        return found.value, found.n

    assert relations(GOLD) == (1.0, 1)
    assert relations("There is a small red cube to the right of a large blue sphere.") == (0.0, 1)
    assert relations("From right to left: a large blue sphere and a small red cube.") == (1.0, 1)
    assert relations("There is a red cube behind a sphere. It is a cube on the left.") == (0.5, 2)
    assert relations("There is a small green cube to the right of a large blue sphere.") == (
        None,
        0,
    )  # it is not there
    assert relations("There is a small red cube. There is a large blue sphere.") == (None, 0)
    assert relations("A picture of a large blue sphere in the middle.") == (0.0, 1)
    close = {**TWO, "objects": [RED, {**BLUE, "x": 0.23}]}
    assert numbers(record(GOLD, close))["relations"].n == 0  # too close to say
    # Of two that are alike, it is enough that one stands there.
    twins = {**TWO, "objects": [RED, BLUE, {**RED, "x": 0.95}]}
    row = "From left to right: a small red cube, a large blue sphere and a small red cube. The sign says cat."
    found = numbers(record(row, twins))
    assert (found["relations"].value, found["relations"].n, found["exact"].value) == (1.0, 2, 1.0)


def test_naming_a_thing_twice_costs_precision_and_is_no_hallucination() -> None:
    found = numbers(
        record("From left to right: a small red cube, a small red cube and a large blue sphere.", TWO)
    )
    assert found["precision"].value == pytest.approx(2 / 3) and found["recall"].value == 1.0
    assert found["chair_i"].value == found["chair_s"].value == 0.0
    assert found["f1"].value == pytest.approx(0.8)


def test_saying_little_is_true_but_finds_nothing() -> None:
    found = numbers(record("A cube and a blue sphere.", TWO))
    assert (found["precision"].value, found["recall"].value, found["f1"].value, found["chair_i"].value) == (
        1.0,
        0.0,
        0.0,
        0.0,
    )
    # A largest matching, whatever the order: the plain cube leaves the red one to the red mention.
    both = {**TWO, "objects": [RED, {**RED, "colour": "blue", "x": 0.6}]}
    for text in ("a cube and a red cube", "a red cube and a cube"):
        assert numbers(record(text, both))["precision"].value == 1.0
    assert numbers(record("a red cube and a small cube and a large cube", both))[
        "precision"
    ].value == pytest.approx(2 / 3)


def test_signs_counts_and_charts() -> None:
    said = numbers(record(GOLD.replace("cat", "dog"), TWO))
    assert (said["signs"].value, said["sign_recall"].value, said["f1"].value, said["exact"].value) == (
        0.0,
        0.0,
        1.0,
        0.0,
    )
    silent = numbers(record(GOLD.partition(".")[0], TWO))
    assert (silent["signs"].value, silent["sign_recall"].value, silent["exact"].value) == (None, 0.0, 0.0)
    none = numbers(record(GOLD, {**TWO, "sign": None}))
    assert (none["signs"].value, none["sign_recall"].value, none["exact"].value) == (0.0, None, 0.0)
    assert numbers(record("There are 2 objects.", TWO))["counts"].value == 1.0
    assert numbers(record("There are 3 objects.", TWO))["counts"].value == 0.0
    chart = numbers(record("A chart with 3 bars: red 3 and cyan 6.", CHART))
    assert chart["counts"].value == 0.0 and chart["precision"].value == 0.5 and chart["chair_i"].value == 0.5
    assert chart["chair_i_shape"].value == 0.0
    beside = numbers(record("A small red cube.", CHART))
    assert beside["chair_i_shape"].value == 1.0 and beside["recall"].value == 0.0 and beside["recall"].n == 2


def test_nothing_said_divides_by_nothing() -> None:
    found = numbers(record("What a lovely day", TWO), record("", CHART, "s/1"))
    assert {name: found[name].value for name in ("precision", "recall", "f1", "chair_i", "chair_s", "unparsed", "exact")} == {
        "precision": None, "recall": 0.0, "f1": 0.0, "chair_i": None, "chair_s": 0.0, "unparsed": 1.0, "exact": 0.0,
    }  # fmt: skip
    assert found["chair_i"].n == 0 and found["chair_s"].n == 2
    wrong = numbers(record("a green cone", TWO))
    assert (wrong["f1"].value, wrong["chair_i"].value) == (0.0, 1.0)
    assert {m.value for name, m in measures_of([]).items() if name != "f1"} == {None}
    assert measures_of([])["f1"].value is None


def test_numbers_are_pooled_over_captions() -> None:
    found = numbers(
        record(GOLD, TWO, "s/0"),
        record("There is a green cone, a green cube and a green sphere.", TWO, "s/1"),
        record("unheard", TWO, "s/2", error="too long"),
    )
    assert found["chair_i"].value == 3 / 5 and found["chair_i"].n == 5
    assert found["chair_s"].value == 1 / 3 and found["chair_i_shape"].value == 1 / 5
    assert found["precision"].value == 2 / 5 and found["recall"].value == 2 / 6
    assert found["unparsed"].value == 1 / 3
    assert all(m.standard_error is None or np.isfinite(m.standard_error) for m in found.values())


def test_a_record_that_was_never_asked_names_nothing() -> None:
    marked, scores = SceneCaptions().score([record(GOLD, TWO, error="no picture")])
    assert marked[0]["parsed"] is None and not marked[0]["right"]
    assert scores.measures["recall"].value == 0.0 and scores.measures["precision"].value is None


def test_the_standard_error_of_a_ratio_is_that_of_captions() -> None:
    rng = np.random.default_rng(0)
    parts = rng.integers(0, 2, 50).astype(float)
    assert pooled(parts, np.ones(50)).standard_error == pytest.approx(mean(parts.tolist()).standard_error)
    wholes = rng.integers(1, 6, 400).astype(float)
    parts = rng.binomial(wholes.astype(int), 0.3).astype(float)
    found = pooled(parts, wholes)
    draws = rng.integers(0, 400, (4000, 400))
    spread = (parts[draws].sum(1) / wholes[draws].sum(1)).std()
    assert found.standard_error == pytest.approx(spread, rel=0.1)
    # F1 too: captions with two mentions, of which none, one or both are right.
    texts = (
        "a small red cube and a large blue sphere",
        "a small red cube and a green cone",
        "a green cone and a cyan cube",
    )
    compared = [compare(read_caption(texts[i]), scene_of(TWO)) for i in rng.integers(0, 3, 200)]
    f1 = measures_of(compared)["f1"]
    each = [(c.right + c.found) / (c.mentions + c.things) for c in compared]
    assert f1.value == pytest.approx(np.mean(each)) and f1.standard_error == pytest.approx(
        mean(each).standard_error
    )


def test_facts_are_needed() -> None:
    for meta in ({}, {"objects": [{"shape": "cube"}]}, {"objects": None}):
        with pytest.raises(UserError, match="suite s, s/0: scene_captions needs the facts of a scene"):
            numbers(record(GOLD, meta))


def test_no_torch() -> None:
    code = "import sys, opsin.evaluation.scorers.captions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
