"""Each benchmark's own numbers, by hand, and what the same answers give under other rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.data.scenes import SceneConfig, sample
from opsin.evaluation.questions import questions
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


# POPE


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


# MMVP


def letters(number: int, gold: str, output: str, **meta: Any) -> dict[str, Any]:
    return {**record(number, gold, output, **meta), "choices": ["(a)", "(b)"]}


def test_mmvp_pairs() -> None:
    said = ["(a)", "(b)", "(a)", "(a)", "B", "It is a dog, so B", "(a)"]
    gold = ["(a)", "(b)", "(a)", "(b)", "(a)", "(b)", "(a)"]
    records = [letters(i, g, s, pair=i // 2) for i, (g, s) in enumerate(zip(gold, said, strict=True))]
    _, scores = make("mmvp").score(reversed(records))
    assert scores.primary == "pair_accuracy"
    assert (scores.measures["pair_accuracy"].value, scores.measures["pair_accuracy"].n) == (
        pytest.approx(1 / 3),
        3,
    )
    assert scores.measures["accuracy"].value == pytest.approx(5 / 7)
    incomplete = scores.measures["incomplete_pairs"]
    assert (incomplete.value, incomplete.n, incomplete.unit) == (1, 4, "count")
    assert scores.measures["pair_chance"].value == 0.25 and scores.measures["chance"].value == 0.5
    # Corrected labels swap both members of a pair: they change what is right, not what is read.
    other = [
        {**r, "gold": {"(a)": "(b)", "(b)": "(a)"}[r["gold"]]} if r["meta"]["pair"] == 0 else r
        for r in records
    ]
    assert make("mmvp").score(other)[1].measures["pair_accuracy"].value == 0.0  # fmt: skip
    with pytest.raises(UserError, match=r"pair 0 has 3 questions"):
        make("mmvp").score([*records, letters(9, "(a)", "(a)", pair=0)])
    with pytest.raises(UserError, match=r"suite s, 9: meta.pair is missing"):
        make("mmvp").score([letters(9, "(a)", "(a)")])


# CV-Bench


@given(
    st.lists(
        st.tuples(st.sampled_from(["ADE20K", "COCO", "Omni3D"]), st.booleans(), st.sampled_from(["Count", "Depth"])),
        max_size=40,
    )
)  # fmt: skip
def test_cv_bench_is_the_mean_over_sources_not_over_questions(
    drawn: list[tuple[str, bool, str]],
) -> None:
    records = [
        {**letters(i, "(A)", "A" if right else "B", source=source), "kind": task}
        for i, (source, right, task) in enumerate(drawn)
    ]
    found = values(make("cv_bench").score(records)[1])

    def rate(source: str) -> float | None:
        flags = [right for one, right, _ in drawn if one == source]
        return sum(flags) / len(flags) if flags else None

    ade, coco, omni = (rate(source) for source in ("ADE20K", "COCO", "Omni3D"))
    two = None if ade is None or coco is None else (ade + coco) / 2
    overall = None if two is None or omni is None else (two + omni) / 2
    assert found["3d"] == omni and found["ADE20K"] == ade and found["COCO"] == coco
    assert found["2d"] == (two if two is None else pytest.approx(two))
    assert found["overall"] == (overall if overall is None else pytest.approx(overall))


def test_cv_bench_halves_tasks_and_forms_of_answers() -> None:
    answers = ["The answer is B", "Answer: B", "(B)", "b.", "A", "B"]
    sources = ["ADE20K", "ADE20K", "ADE20K", "COCO", "COCO", "Omni3D"]
    records = [
        {**letters(i, "(B)", answer, source=source), "kind": "Depth" if source == "Omni3D" else "Count"}
        for i, (answer, source) in enumerate(zip(answers, sources, strict=True))
    ]
    _, scores = make("cv_bench").score(records)
    found = values(scores)
    assert (found["2d"], found["3d"], found["overall"]) == (0.75, 1.0, 0.875)
    assert found["accuracy"] == pytest.approx(5 / 6)  # what lmms-eval prints
    assert list(scores.by_kind["Depth"]) == ["accuracy", "chance", "majority", "unparsed"]
    half = make("cv_bench_2d").score(records[:5])[1]
    assert half.primary == "2d" and values(half)["2d"] == 0.75 and values(half)["overall"] is None
    assert make("cv_bench_3d").primary == "3d"
    with pytest.raises(UserError, match=r"meta.source 'ADE20k'; did you mean 'ADE20K'\?"):
        make("cv_bench").score([letters(0, "(A)", "A", source="ADE20k")])


# HallusionBench


def hallusion(category: str, figure: int, question: int, right: bool) -> dict[str, Any]:
    meta = {
        "category": category, "subcategory": "chart", "set_id": "0", "figure_id": str(figure), "question_id": question,
    }  # fmt: skip
    number = 100 * (category == "VS") + 10 * figure + question
    gold = str((figure + question) % 2)
    said = {"0": "No.", "1": "Yes, it is."} if right else {"0": "Yes.", "1": "No, it isn't."}
    return record(number, gold, said[gold], kind=category, **meta)


def test_hallusion_bench_by_hand() -> None:
    # VD: 2 figures x 2 questions, one wrong. VS: figures 0, 1, 2 x 2 questions, two wrong, both about figure 0.
    wrong = {("VD", 1, 1), ("VS", 0, 0), ("VS", 0, 1)}
    records = [
        hallusion(category, figure, question, (category, figure, question) not in wrong)
        for category, figures in (("VD", (0, 1)), ("VS", (0, 1, 2)))
        for figure in figures
        for question in (0, 1)
    ]
    _, scores = make("hallusion_bench").score(records)
    assert values(scores) == {
        "aAcc": 7 / 10,
        "fAcc": 3 / 5,  # VD 0, VS 1 and VS 2
        "qAcc": 1 / 4,  # question 0 of VD
        "fAcc_without_VS_0": 3 / 4,
        "unparsed": 0.0,
    }
    assert [scores.measures[name].n for name in ("aAcc", "fAcc", "qAcc", "fAcc_without_VS_0")] == [
        10,
        5,
        4,
        4,
    ]
    assert scores.by_kind["VD"]["qAcc"].value == 0.5 and scores.by_kind["VS"]["qAcc"].value == 0.0
    unclear = [{**r, "output": "It is unclear."} for r in records]
    assert values(make("hallusion_bench").score(unclear)[1])["aAcc"] == 0.0
    with pytest.raises(UserError, match=r"meta.figure_id is missing"):
        make("hallusion_bench").score([record(0, "1", "yes", category="VD", subcategory="x", set_id=1)])


# MMBench


def test_circular_accuracy_needs_every_copy() -> None:
    def copies(index: int, said: list[str], kind: str) -> list[dict[str, Any]]:
        return [
            {
                **record(index + 10**6 * i, "ABC"[i], output, kind=kind, index=index + 10**6 * i),
                "choices": ["A", "B", "C"],
            }
            for i, output in enumerate(said)
        ]

    records = [
        *copies(7, ["A", "(B)", "C."], "one"),
        *copies(8, ["A", "B", "A"], "one"),
        *copies(9, ["A", "B"], "two"),
    ]
    _, scores = make("mmbench").score(reversed(records))
    circular = scores.measures["circular_accuracy"]
    assert (circular.value, circular.n) == (0.5, 2)
    assert scores.measures["incomplete_questions"].value == 1
    assert scores.measures["accuracy"].value == 7 / 8
    assert scores.by_kind["two"]["circular_accuracy"].value is None
    with pytest.raises(UserError, match=r"meta.index should be a whole number, got 'x'"):
        make("mmbench").score([{**record(0, "A", "A", index="x"), "choices": ["A", "B"]}])


# Exact


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


# Scenes


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
