"""Exact answers, and real scenes answered by habit, alike, or rightly."""

from __future__ import annotations

from typing import Any

import pytest

from opsin.data.scenes import SceneConfig, sample
from opsin.evaluation.questions import questions
from opsin.evaluation.scorers import Scores, make
from opsin.models.errors import UserError


def record(number: int, gold: str, output: str, kind: str = "all", **meta: Any) -> dict[str, Any]:
    return {
        "suite": "s", "id": str(number), "kind": kind, "gold": gold, "output": output, "choices": [], "meta": meta,
    }  # fmt: skip


def values(scores: Scores) -> dict[str, float | None]:
    return {name: measure.value for name, measure in scores.measures.items()}


def test_exact_relaxed_and_first_words() -> None:
    table = {
        # output, gold: exact, exact_relaxed, first_words
        ("red", "red"): (True, True, True),
        (" red\n", "red"): (True, True, True),
        ("Red.", "red"): (False, True, False),
        ("red cube", "red"): (False, False, True),
        ("two  cubes.", "Two cubes"): (False, True, False),
        ("the red cube", "red"): (False, False, False),
        ("dark blue and green", "dark blue"): (False, False, True),
        ("dark", "dark blue"): (False, False, False),
        ("reddish", "red"): (False, False, False),
        ("3.", "3"): (False, True, False),
        ("", "red"): (False, False, False),
    }
    for (output, gold), wanted in table.items():
        found = []
        for name in ("exact", "exact_relaxed", "first_words"):
            (marked,), _ = make(name).score([record(0, gold, output)])
            found.append(marked["right"])
            assert (marked["parsed"] is None) == (output == "")
        assert tuple(found) == wanted, (output, gold)
    with pytest.raises(UserError, match="gold is empty"):
        make("first_words").score([record(0, " ", "red")])


def scene_records(split: str, count: int, answer: str | None = None, by_prior: bool = False) -> list[dict[str, Any]]:  # fmt: skip
    """Questions of real scenes, one a record; answered rightly, always alike, or by what is usual."""
    records = []
    for index in range(count):
        drawn = sample(SceneConfig(), 5, split, index)
        meta = drawn["meta"]
        for turn, (_, gold, kind) in enumerate(questions(drawn)):
            prior = meta["prior"][turn]
            of = {"split": split, "pair": meta["pair"], "fact": meta["fact"], "prior": prior}
            said = answer or (prior if by_prior and prior else gold)
            records.append({**record(turn, gold, said, kind, **of), "id": f"{drawn['id']}/{turn}"})
    return records


def test_whoever_answers_by_habit_fails_where_scenes_go_against_it() -> None:
    records = [
        *scene_records("conflict", 12, by_prior=True),
        *scene_records("aligned", 12, by_prior=True),
    ]
    found = values(make("scenes").score(records)[1])
    assert found == {
        "accuracy": 0.5, "accuracy/aligned": 1.0, "accuracy/conflict": 0.0, "aligned_accuracy": 1.0,
        "conflict_accuracy": 0.0, "balanced_accuracy": 0.5, "prior_answer_rate": 1.0, "unparsed": 0.0,
    }  # fmt: skip
    _, seeing = make("scenes").score(scene_records("conflict", 12))
    assert values(seeing)["conflict_accuracy"] == 1.0 and values(seeing)["prior_answer_rate"] == 0.0
    assert values(seeing)["balanced_accuracy"] is None and seeing.measures["aligned_accuracy"].n == 0
    talking = [{**r, "output": r["output"] + " , I think"} for r in records]
    assert values(make("scenes").score(talking)[1])["prior_answer_rate"] == 0.0
    assert values(make("scenes_first_words").score(talking)[1])["prior_answer_rate"] == 1.0


def test_minimal_pairs_of_scenes() -> None:
    records = scene_records("minimal_pairs", 24)
    assert values(make("scenes").score(records)[1])["pair_accuracy"] == 1.0
    constant = {
        r["meta"]["pair"]: r["gold"] for r in records
    }  # one answer to both: half right, no pair right
    found = values(make("scenes").score([{**r, "output": constant[r["meta"]["pair"]]} for r in records])[1])
    assert (found["accuracy"], found["pair_accuracy"]) == (0.5, 0.0)
    spoilt = [{**r, "output": "?"} if r["meta"]["fact"] == "colour" else r for r in records[1:]]
    _, scores = make("scenes").score(spoilt)
    found = values(scores)
    assert found["pair_accuracy/colour"] == 0.0 and found["pair_accuracy/count"] == 1.0
    assert found["incomplete_pairs"] == 1 and scores.measures["pair_accuracy"].n == 11


def test_existence_of_scenes_is_scored_as_pope() -> None:
    splits = ("exists_random", "exists_popular", "exists_adversarial")
    records = [r for split in splits for r in scene_records(split, 6, answer="Yes, there is.")]
    found = values(make("scenes").score(records)[1])
    assert found["accuracy"] == found["exists/accuracy"] == found["exists/mean_of_splits"] == 0.5
    assert (found["exists/precision"], found["exists/recall"], found["exists/yes_ratio"]) == (0.5, 1.0, 1.0)
    alone = values(make("pope").score(records)[1])
    assert {
        f"exists/{name}": value for name, value in alone.items() if name != "unparsed"
    }.items() <= found.items()
    mixed = [*records, *scene_records("conflict", 4)]
    found = values(make("scenes").score(mixed)[1])
    assert found["conflict_accuracy"] == 1.0 and found["exists/yes_ratio"] == 1.0
