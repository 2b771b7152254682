"""MMVP, CV-Bench, HallusionBench and MMBench by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.evaluation.scorers import Scores, make
from opsin.models.errors import UserError


def record(number: int, gold: str, output: str, kind: str = "all", **meta: Any) -> dict[str, Any]:
    return {
        "suite": "s", "id": str(number), "kind": kind, "gold": gold, "output": output, "choices": [], "meta": meta,
    }  # fmt: skip


def values(scores: Scores) -> dict[str, float | None]:
    return {name: measure.value for name, measure in scores.measures.items()}


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
