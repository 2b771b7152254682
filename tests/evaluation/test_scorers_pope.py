"""POPE and yes/no: what LLaVA's rule, lmms-eval's and ours make of the same answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.evaluation.scorers import Scores, make
from opsin.evaluation.scorers.yesno import llava_pope_rule, read_yes_no
from opsin.models.errors import UserError

RIGHT = (
    ("Yes", "yes"),
    ("No", "no"),
    ("yes", "yes"),
    ("no", "no"),
    (" Yes\n", "yes"),
    ("YES", "yes"),
    ("No", "no"),
    ("no ", "no"),
    ("Yes.", "yes"),
    ("No, there is not.", "no"),
    ("Sure", "yes"),
    ("Yes, there is a dog in the image.", "yes"),
    ("No.", "no"),
    ("There is a dog.", "yes"),
    ("There is no dog.", "no"),
    ("It does not.", "no"),
    ("Of course.", "yes"),
    ("I can see one", "yes"),
    ("I do not see one", "no"),
    ("Correct", "yes"),
)
"""Twenty answers that anyone would call right, with their gold."""

# text: what LLaVA's rule makes of it, what `pope` shows as its reading, what `pope_read` reads.
STRESS = {
    "": ("yes", None, None),
    "banana": ("yes", None, None),
    "a a a a": ("yes", None, None),
    "The image shows a park": ("yes", None, None),
    "Nope": ("yes", None, "no"),
    "NO": ("yes", None, "no"),
    "No!": ("yes", None, "no"),
    "No\nthere is none": ("yes", None, "no"),
    "There isn't one": ("yes", None, "no"),
    "It’s not there": ("no", "no", "no"),
    "Not sure": ("yes", None, None),
    "I am not sure": ("no", "no", None),
    "I don't know": ("yes", None, None),
    "It is unclear.": ("yes", None, None),
    "Yes and no": ("no", "no", None),
    "yes/no": ("yes", None, None),
    "Yes, but not a big one": ("no", "no", "yes"),
    "There is a park. No dog is there.": ("yes", "yes", "yes"),
    "The picture shows a park. No dog is there.": ("yes", None, "no"),
    "Absolutely not": ("no", "no", "no"),
    "Of course not.": ("no", "no", "no"),
    "The answer is no.": ("no", "no", "no"),
    "Answer: yes": ("yes", "yes", "yes"),
    "**Yes**": ("yes", "yes", "yes"),
    "True": ("yes", "yes", "yes"),
    "Nothing like that": ("yes", None, "no"),
}


def record(number: int, gold: str, output: str, kind: str = "all", **meta: Any) -> dict[str, Any]:
    return {
        "suite": "s", "id": str(number), "kind": kind, "gold": gold, "output": output, "choices": [], "meta": meta,
    }  # fmt: skip


def values(scores: Scores) -> dict[str, float | None]:
    return {name: measure.value for name, measure in scores.measures.items()}


def test_twenty_right_answers_are_right_and_a_comparison_with_yes_and_no_finds_eight() -> None:
    records = [record(i, gold, output) for i, (output, gold) in enumerate(RIGHT)]
    for name in ("pope", "pope_read", "hallusion_bench"):
        if name == "hallusion_bench":
            records = [
                {**r, "meta": {"category": "VD", "subcategory": "x", "set_id": 0, "figure_id": 1, "question_id": i}}
                for i, r in enumerate(records)
            ]  # fmt: skip
        marked, scores = make(name).score(records)
        assert [r["parsed"] for r in marked] == [gold for _, gold in RIGHT]
        assert scores.measures[scores.primary].value == 1.0 and scores.measures["unparsed"].value == 0.0
    # lmms-eval's rule: the answer, in lower case and without white space around it, must be the word.
    assert sum(output.lower().strip() == gold for output, gold in RIGHT) / len(RIGHT) == 0.4


@pytest.mark.parametrize(("text", "wanted"), STRESS.items())
def test_what_llavas_rule_and_ours_make_of_odd_answers(
    text: str, wanted: tuple[str, str | None, str | None]
) -> None:
    pope, read = make("pope"), make("pope_read")
    asked = record(0, "yes", text)
    assert (llava_pope_rule(text), pope.read(asked), read.read(asked)) == wanted
    assert read_yes_no(text) == wanted[2]
    # Whatever the reading is, what counts is LLaVA's rule.
    assert pope.right(asked, pope.read(asked)) is (wanted[0] == "yes")
    assert read.right(asked, read.read(asked)) is (wanted[2] == "yes")


@given(text=st.one_of(st.text(max_size=30), st.sampled_from(sorted(STRESS)), st.lists(st.sampled_from(
    ["yes", "no", "not", "No", "No,", "there", "is", "a", "dog.", "sure"])).map(" ".join)))  # fmt: skip
def test_pope_counts_what_llavas_rule_says(text: str) -> None:
    pope = make("pope")
    for gold in ("yes", "no"):
        (marked,), _ = pope.score([record(0, gold, text)])
        assert marked["right"] is (llava_pope_rule(text) == gold)
        assert marked["parsed"] in (None, llava_pope_rule(text))


def test_gibberish_counts_as_yes_and_shows() -> None:
    records = [record(i, gold, "banana") for i, gold in enumerate(["yes", "no", "no", "no"])]
    _, scores = make("pope").score(records)
    assert values(scores) == {
        "accuracy": 0.25, "precision": 0.25, "recall": 1.0, "f1": 0.4, "yes_ratio": 1.0, "gold_yes_ratio": 0.25,
        "unparsed": 1.0,
    }  # fmt: skip
    _, scores = make("pope_read").score(records)
    assert values(scores) == {
        "accuracy": 0.0, "precision": None, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0, "gold_yes_ratio": 0.25,
        "unparsed": 1.0,
    }  # fmt: skip
    _, scores = make("pope").score([{**r, "error": "too long"} for r in records])  # never asked: not a yes
    assert values(scores)["accuracy"] == 0.0 and values(scores)["yes_ratio"] == 0.0


def test_pope_by_hand() -> None:
    said = ["yes"] * 5 + ["no"] * 3
    gold = ["yes", "yes", "yes", "no", "no", "yes", "no", "no"]
    _, scores = make("pope").score([record(i, g, s) for i, (g, s) in enumerate(zip(gold, said, strict=True))])
    found = scores.measures
    assert (found["accuracy"].value, found["accuracy"].n) == (5 / 8, 8)
    assert (found["precision"].value, found["precision"].n) == (3 / 5, 5)
    assert (found["recall"].value, found["recall"].n) == (3 / 4, 4)
    assert found["f1"].value == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert found["yes_ratio"].value == 5 / 8 and found["gold_yes_ratio"].value == 4 / 8
    assert found["precision"].standard_error == pytest.approx((0.6 * 0.4 / 5) ** 0.5)
    _, nobody = make("pope").score([record(0, "no", "no"), record(1, "no", "no")])
    assert [nobody.measures[name].value for name in ("precision", "recall", "f1")] == [None, None, None]
    with pytest.raises(UserError, match="gold should be yes or no, got 'maybe'"):
        make("pope").score([record(0, "maybe", "yes")])


def test_the_standard_error_of_f1_is_that_of_a_bootstrap() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    gold = random.random(400) < 0.5
    said = np.where(random.random(400) < 0.2, ~gold, gold)
    records = [
        record(i, "yes" if g else "no", "yes" if s else "no")
        for i, (g, s) in enumerate(zip(gold, said, strict=True))
    ]
    found = make("pope").score(records)[1].measures["f1"]
    drawn = random.integers(0, 400, (4000, 400))
    hits = (said & gold)[drawn].sum(1)
    spread = (2 * hits / (said[drawn].sum(1) + gold[drawn].sum(1))).std()
    assert found.value == pytest.approx(2 * (said & gold).sum() / (said.sum() + gold.sum()))
    assert found.standard_error == pytest.approx(spread, rel=0.05)


def test_the_mean_of_the_three_splits() -> None:
    right = {"random": 4, "popular": 3, "adversarial": 2}
    records = [
        record(number * 10 + i, "yes" if i % 2 else "no", "yes" if (i % 2 == 1) == (i < right[split]) else "no", kind=split)
        for number, split in enumerate(right) for i in range(6 if split == "random" else 4)
    ]  # fmt: skip
    _, scores = make("pope").score(records)
    by_split = {kind: row["accuracy"].value for kind, row in scores.by_kind.items()}
    assert by_split == {"random": pytest.approx(4 / 6), "popular": 0.75, "adversarial": 0.5}
    found = scores.measures["mean_of_splits"]
    assert found.value == pytest.approx((4 / 6 + 0.75 + 0.5) / 3) and found.n == 14
    assert scores.measures["accuracy"].value == pytest.approx(9 / 14)
    errors = [row["accuracy"].standard_error for row in scores.by_kind.values()]
    assert found.standard_error == pytest.approx(sum(e for e in errors if e is not None) / 3)
    assert scores.measures["f1_mean_of_splits"].value == pytest.approx(
        sum(row["f1"].value or 0 for row in scores.by_kind.values()) / 3
    )
    _, two = make("pope").score([r for r in records if r["kind"] != "popular"])
    assert two.measures["mean_of_splits"].value is None  # a mean of two is another number
    _, one = make("pope").score([r for r in records if r["kind"] == "popular"])
    assert "mean_of_splits" not in one.measures and one.by_kind == {}
