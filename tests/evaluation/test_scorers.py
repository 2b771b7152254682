"""What holds for every scorer: nothing to score, nothing readable, any order, ranked choices; and scoring again."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.evaluation.records import read_predictions, write_predictions
from opsin.evaluation.rescore import compare, rescore
from opsin.evaluation.scorers import SCORERS, make
from opsin.evaluation.scorers.base import Measure, Scores, mean, mean_of, share
from opsin.evaluation.scorers.ranked import likeliest
from opsin.models.errors import UserError

YES_NO = ("pope", "pope_read", "hallusion_bench")
WORDS = ("exact", "exact_relaxed", "first_words", "scenes", "scenes_first_words")
ODD = ["", "banana", "A", "(b)", "Yes", "No.", "There is not", "red", "red cube", "The answer is B", "Nope"]


def drawn(name: str, number: int, seed: int) -> dict[str, Any]:
    """A prediction that has all that any scorer looks at."""
    of = random.Random(f"{name} {number} {seed}")
    yes_no = name in YES_NO
    gold = of.choice(["yes", "no"] if yes_no else ["red", "blue"] if name in WORDS else ["A", "(b)"])
    meta = {
        "pair": number // 2, "index": number // 2 + 10**6 * (number % 2), "source": of.choice(["ADE20K", "COCO", "Omni3D"]),
        "category": of.choice(["VD", "VS"]), "subcategory": "x", "set_id": number // 8, "figure_id": number % 2,
        "question_id": number // 2 % 4, "prior": of.choice(["red", "blue", None]), "fact": of.choice(["colour", "size"]),
        "split": of.choice(["conflict", "uniform"]),
    }  # fmt: skip
    return {
        "suite": name, "id": f"q/{number}", "kind": of.choice(["random", "popular", "adversarial", "other"]), "gold": gold,
        "output": of.choice([*ODD, gold, gold]), "meta": meta, "question": "",
        "choices": ["yes", "no"] if yes_no else ["red", "blue"] if name in WORDS else ["A", "B"],
    }  # fmt: skip


def ranked(record: dict[str, Any], best: int, tokens: tuple[int, int] = (1, 1)) -> dict[str, Any]:
    logprobs = {
        choice: {"sum": -1.0 if i == best else -2.0, "tokens": tokens[i]}
        for i, choice in enumerate(record["choices"])
    }
    return {**record, "logprobs": logprobs}


def values(scores: Scores) -> dict[str, float | None]:
    return {name: measure.value for name, measure in scores.measures.items()}


def test_scorers_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, opsin.evaluation.scorers, opsin.evaluation.rescore\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'composer', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_table_of_scorers() -> None:
    for name, one in SCORERS.items():
        assert make(name).name == name == one().name and make(f"{name}/1").version >= 1
        token = make(f"{name}@token")
        assert token.name == f"{name}@token" and token.rank == "token"
        assert make(f"{name}@sum").name == name
    for name, hint in (("pop", "did you mean 'pope'"), ("", "known: "), ("pope@tokens", "'pope@token'")):
        with pytest.raises(UserError, match=rf"scorer '{name}'; {hint}|scorer '{name}'; did you mean {hint}"):
            make(name)
    with pytest.raises(UserError, match=r"scorer pope: rank 'mean'; known: sum, token"):
        SCORERS["pope"]("mean")


@pytest.mark.parametrize("name", SCORERS)
def test_nothing_to_score(name: str) -> None:
    marked, scores = make(name).score([])
    assert marked == [] and scores.by_kind == {} and scores.primary in scores.measures
    assert all(one.n == 0 and one.value in (None, 0.0) for one in scores.measures.values())
    assert scores.measures[scores.primary].value is None and scores.measures["unparsed"].value is None
    assert scores.as_dict()["scorer"] == f"{name}/1"


ONE_ANSWER = [name for name in SCORERS if name != "scene_captions"]
"""Scorers of one right answer; captions are judged by a scene's facts (``test_captions.py``)."""


@pytest.mark.parametrize("name", ONE_ANSWER)
def test_nothing_that_can_be_read(name: str) -> None:
    records = [{**drawn(name, i, 0), "output": " ", "parsed": "yes", "right": True} for i in range(12)]
    marked, scores = make(name).score(records)
    assert all(r["parsed"] is None for r in marked) and scores.measures["unparsed"].value == 1.0
    if name == "pope":  # whatever does not deny counts as yes
        assert [r["right"] for r in marked] == [r["gold"] == "yes" for r in records]
    else:
        assert not any(r["right"] for r in marked)
        assert scores.measures[scores.primary].value in (0.0, None)
    asked = make(name).score([{**r, "error": "too long", "output": r["gold"]} for r in records])[0]
    assert not any(r["right"] or r["parsed"] for r in asked)


@pytest.mark.parametrize("name", ONE_ANSWER)
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 24), seed=st.integers(0, 10**6), rank=st.booleans(), data=st.data())
def test_order_does_not_matter_and_shares_are_shares(
    name: str, count: int, seed: int, rank: bool, data: st.DataObject
) -> None:
    records = [drawn(name, i, seed) for i in range(count)]
    if rank:
        records = [ranked(r, i % 2, (1 + i % 3, 1 + seed % 4)) if i % 5 else r for i, r in enumerate(records)]
    marked, scores = make(name).score(records)
    shuffled = data.draw(st.permutations(records))
    again, others = make(name).score(shuffled)
    assert others == scores
    by_id = {r["id"]: r for r in again}
    assert [by_id[r["id"]] for r in marked] == marked
    assert [{k: v for k, v in r.items() if k not in ("parsed", "right")} for r in marked] == records
    for numbers in (scores.measures, *scores.by_kind.values()):
        assert ("unparsed" in numbers and "accuracy" in numbers) or name == "hallusion_bench"
        for one in numbers.values():
            assert one.n >= 0 and (one.unit == "count" or one.value is None or 0 <= one.value <= 1)
            assert one.standard_error is None or 0 <= one.standard_error <= 1
    n = scores.measures["unparsed"].n
    assert n == count and sum(row["unparsed"].n for row in scores.by_kind.values()) in (0, count)
    # Marking what is marked changes nothing.
    assert make(name).score(marked) == (marked, scores)


# Ranked choices


def test_the_likeliest_choice_by_sum_and_by_token() -> None:
    logprobs = {"red": {"sum": -2.0, "tokens": 1}, "dark blue": {"sum": -3.0, "tokens": 2}}
    record = {
        **drawn("exact", 0, 0),
        "choices": ["red", "dark blue"],
        "logprobs": logprobs,
        "output": "green",
    }
    assert (likeliest(record), likeliest(record, "token")) == ("red", "dark blue")
    record["gold"] = "dark blue"
    _, scores = make("exact").score([record])
    assert values(scores) == {"accuracy": 0.0, "unparsed": 0.0, "accuracy_by_token": 1.0}
    marked, scores = make("exact@token").score([record])
    assert marked[0]["parsed"] == "dark blue"
    assert values(scores) == {"accuracy": 1.0, "unparsed": 0.0, "accuracy_by_sum": 0.0}
    assert scores.as_dict()["scorer"] == "exact@token/1"


def test_equally_likely_choices_and_broken_likelihoods() -> None:
    record = ranked(drawn("pope", 0, 0), 0)
    record["logprobs"]["no"]["sum"] = -1.0
    for name in ("pope", "pope_read"):
        (marked,), scores = make(name).score([record])
        assert marked["parsed"] is None and not marked["right"] and scores.measures["yes_ratio"].value == 0.0
    minus = {"yes": {"sum": float("-inf"), "tokens": 1}, "no": {"sum": -700.0, "tokens": 1}}
    assert likeliest({**record, "logprobs": minus}) == "no"
    for broken in (
        {"sum": float("nan"), "tokens": 1}, {"sum": -1.0, "tokens": 0}, {"sum": -1.0}, {"sum": "x", "tokens": 1}, -1.0,
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"suite pope, q/0: logprobs of 'no': use"):
            likeliest({**record, "logprobs": {**minus, "no": broken}})
    with pytest.raises(UserError, match=r"logprobs should name the choices, \['no', 'yes'\]"):
        likeliest({**record, "logprobs": {"yes": minus["yes"]}})


@pytest.mark.parametrize("name", ONE_ANSWER)
def test_every_scorer_reads_ranked_choices(name: str) -> None:
    records = [drawn(name, i, 3) for i in range(16)]
    golds = {"yes": 0, "no": 1, "red": 0, "blue": 1, "A": 0, "(b)": 1}
    right = [ranked({**r, "output": "banana"}, golds[r["gold"]]) for r in records]
    wrong = [ranked({**r, "output": r["gold"]}, 1 - golds[r["gold"]]) for r in records]
    for asked, wanted in ((right, 1.0), (wrong, 0.0)):
        marked, scores = make(name).score(asked)
        assert all(r["right"] is (wanted == 1.0) for r in marked) and scores.measures["unparsed"].value == 0.0
        assert scores.measures[scores.primary].value == wanted
        assert scores.measures[f"{scores.primary}_by_token"].value == wanted


def test_a_ranked_option_is_known_by_its_place() -> None:
    record = {**drawn("letter", 0, 0), "choices": ["B", "a cat", "A"], "gold": "(c)"}
    logprobs = {choice: {"sum": -float(len(choice)), "tokens": 1} for choice in ("a cat", "B")}
    marked, _ = make("letter").score([{**record, "logprobs": {**logprobs, "A": {"sum": -0.5, "tokens": 1}}}])
    assert marked[0]["parsed"] == "C" and marked[0]["right"]  # the third option, whose text is "A"
    twice = {**record, "choices": ["cat", "dog", "cat"]}
    one = {"sum": -1.0, "tokens": 1}
    marked, _ = make("letter").score([{**twice, "logprobs": {"cat": one, "dog": {**one, "sum": -2.0}}}])
    assert marked[0]["parsed"] is None


# Numbers


def test_means_and_their_errors() -> None:
    assert share([]) == Measure(None, 0) and mean([]) == Measure(None, 0)
    assert share([True, False]) == Measure(0.5, 2, pytest.approx(0.125**0.5))
    assert mean([1.0]) == Measure(1.0, 1) and mean([0.0, 2.0], "nats") == Measure(1.0, 2, 1.0, "nats")
    parts = [Measure(0.5, 10, 0.3), Measure(1.0, 20, 0.4)]
    assert mean_of(parts) == Measure(0.75, 30, pytest.approx(0.25))
    assert mean_of(parts, related=True) == Measure(0.75, 30, pytest.approx(0.35))
    assert mean_of([*parts, Measure(None, 0)]) == Measure(None, 30) and mean_of([]) == Measure(None, 0)
    assert mean_of([Measure(0.5, 10), parts[1]]).standard_error is None


# Scoring again


def test_predictions_on_disk_are_scored_again_without_a_model(tmp_path: Path) -> None:
    suites = {"a": "pope", "b": "mmvp", "c": "first_words"}
    records = [{**drawn(suites[s], i, 1), "suite": s} for i in range(6) for s in suites]  # suites interleaved
    write_predictions(tmp_path / "predictions.jsonl", records)
    marked, found = rescore(read_predictions(tmp_path / "predictions.jsonl"), suites)
    assert [(r["suite"], r["id"]) for r in marked] == [(r["suite"], r["id"]) for r in records]
    assert {s: scores.scorer for s, scores in found.items()} == suites
    for suite, name in suites.items():
        alone = make(name).score([r for r in records if r["suite"] == suite])
        assert found[suite] == alone[1]
        assert [r for r in marked if r["suite"] == suite] == [{**r, "scorer": name} for r in alone[0]]
    write_predictions(tmp_path / "again.jsonl", marked)
    named = {suite: scores.as_dict()["scorer"] for suite, scores in found.items()}  # as scores.json has them
    assert rescore(read_predictions(tmp_path / "again.jsonl"), named) == (marked, found)
    for scorers, message in (
        ({"a": "pope", "b": "mmvp"}, "suite c: no scorer is named for it"),
        ({**suites, "d": "pope"}, "suite d: no predictions of it; known: a, b, c"),
        ({**suites, "a": "pop"}, r"scorer 'pop'; did you mean 'pope'\?"),
    ):
        with pytest.raises(UserError, match=message):
            rescore(records, scorers)
    assert rescore([], {}) == ([], {})


def test_two_scorings_side_by_side() -> None:
    outputs = ["Yes", "Nope", "banana", "Yes, but not a big one", "No"]
    records = [{**drawn("pope", i, 0), "gold": "no", "output": output} for i, output in enumerate(outputs)]
    one, _ = rescore(records, {"pope": "pope"})
    other, _ = rescore(records, {"pope": "pope_read"})
    rows = compare(one, list(reversed(other)))
    assert [row["id"] for row in rows] == ["q/1", "q/3"]
    assert rows[0] == {
        "suite": "pope",
        "id": "q/1",
        "gold": "no",
        "output": "Nope",
        "one": {"scorer": "pope", "parsed": None, "right": False},
        "other": {"scorer": "pope_read", "parsed": "no", "right": True},
    }
    assert rows[1]["one"]["right"] and not rows[1]["other"]["right"]
    assert compare(one, one) == []
    with pytest.raises(UserError, match=r"suite pope, q/4: only one of the two scorings has it"):
        compare(one, other[:-1])
    with pytest.raises(UserError, match=r"suite pope, q/0: the two scorings are of other outputs"):
        compare(one, [{**other[0], "output": "No"}, *other[1:]])
