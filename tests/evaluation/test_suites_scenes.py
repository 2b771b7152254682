"""Our own scenes as a suite: made on the fly, and from a dataset."""

from __future__ import annotations

import pytest

from opsin.data.scenes import KINDS, SPLITS, SceneConfig, sample
from opsin.data.schema import unpack_images
from opsin.evaluation import benchmarks
from opsin.evaluation.benchmarks import scenes
from opsin.evaluation.suites import GROUPS

from question_files import made, scored


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_made_on_the_fly_are_those_of_the_generator(split: str) -> None:
    suite = scenes(split=split, samples=6, seed=3, mode="rank", kinds=list(KINDS))
    items = made(suite)
    assert suite.group in GROUPS
    for item in items:
        number, turn = (int(part) for part in item.id.split("/")[-2:])
        stored = sample(SceneConfig(kinds=KINDS), 3, split, number)
        assert (item.gold, item.kind) == (
            stored["conversations"][2 * turn + 1]["value"],
            stored["meta"]["kinds"][turn],
        )
        words = stored["conversations"][2 * turn]["value"].removeprefix("<image>\n")
        assert item.question == f"<image>\n{words}" and item.gold in item.choices
        assert item.meta["prior"] == stored["meta"]["prior"][turn] and item.meta["split"] == split
        assert [read() for read in item.pictures] == unpack_images(stored["images"])
        facts = item.stored()["meta"]
        assert (
            facts["asked"] == [stored["meta"]["asked"][turn]]
            and facts["objects"] == stored["meta"]["objects"]
        )
    numbers = scored(suite, items, lambda item: item.gold)
    assert numbers["accuracy"] == 1 and (split != "minimal_pairs" or numbers["pair_accuracy"] == 1)


def test_scenes_of_several_splits_take_turns_and_other_streams(scenes: str) -> None:
    make = benchmarks.scenes
    items = made(make(split=["aligned", "conflict"], samples=4))
    assert [item.meta["split"] for item in items] == ["aligned", "aligned", "conflict", "conflict"] * 2
    numbers = scored(make(), items, lambda item: item.meta["prior"])
    assert (numbers["aligned_accuracy"], numbers["conflict_accuracy"], numbers["prior_answer_rate"]) == (
        1,
        0,
        1,
    )
    words = made(make(stream="text", samples=3, seed=3))
    for item in words:
        number, turn = (int(part) for part in item.id.split("/")[-2:])
        stored = sample(SceneConfig(), 3, "uniform", number, "text")["conversations"]
        facts, _, first = stored[0]["value"].rpartition("\n")
        assert (
            item.question == f"{facts}\n{stored[2 * turn]['value'] if turn else first}" and not item.pictures
        )
    colours = made(make(ask=["colour"], samples=20))
    assert {item.kind for item in colours} == {"colour"}
    stored = made(make(scenes, samples=5))
    config = SceneConfig(objects=(1, 2), charts=0, sign=0, questions=2, kinds=("colour", "size"))
    again = made(
        make(seed=5, samples=5, objects=[1, 2], charts=0, sign=0, questions=2, kinds=["colour", "size"])
    )
    assert config and [item.id for item in stored] == [item.id for item in again]
    for one, other in zip(stored, again, strict=True):
        assert (one.question, one.gold, one.kind, one.meta) == (
            other.question,
            other.gold,
            other.kind,
            dict(other.meta),
        )
        assert one.pictures[0]() == other.pictures[0]()
