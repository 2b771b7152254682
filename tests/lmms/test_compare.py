"""The same answers scored in four ways: the verdicts, and that every difference is explained."""

from __future__ import annotations

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed; `make test-eval` has it", allow_module_level=True)

from opsin.evaluation.lmms.compare import WHY, compare, leftovers, main

Y, N, X = "yes", "no", "neither"
SAID = [  # answer; LLaVA's rule, strict reading, lmms-eval, by hand; why they differ
    ("Yes", Y, Y, Y, Y, None),
    ("no", N, N, N, N, None),
    ("Yes.", Y, Y, X, Y, "more than the word"),
    ("No, there is not.", N, N, X, N, "more than the word"),
    ("no\n\nIt is not there.", N, N, N, N, None),  # lmms-eval cuts at the empty line
    ("Sure", Y, Y, X, X, "other words"),
    ("Nope", Y, N, X, X, "other words"),
    ("NO", Y, N, N, N, "first word against the rest"),
    ("There is no dog.", N, N, X, X, "denied later"),
    ("a blue cube", Y, X, X, X, "no reading"),
    ("", Y, X, X, X, "no reading"),
]


def records(gold: str) -> list[dict]:
    return [
        {
            "suite": "s",
            "id": f"{gold}/{i}",
            "kind": "random",
            "gold": gold,
            "output": one[0],
            "meta": {},
            "choices": [],
        }
        for i, one in enumerate(SAID)
    ]


def test_each_scorer_takes_each_answer_as_its_rule_says(tmp_path: Path) -> None:
    found = compare(records(Y) + records(N), tmp_path)
    names = list(found["scorers"])
    assert names[2:] == ["lmms-eval", "by hand"]
    differences = {one["id"]: one for one in found["differences"]}
    for gold in (Y, N):
        for i, (_, *verdicts, reason) in enumerate(SAID):
            one = differences.get(f"{gold}/{i}")
            assert (one is None) == (reason is None)
            if one is not None:
                assert one["why"] == reason and [one[name] for name in names] == verdicts
    for at, name in enumerate(names):
        right = [one[1 + at] for one in SAID].count(Y) + [one[1 + at] for one in SAID].count(N)
        assert found["scorers"][name]["accuracy"] == pytest.approx(right / 22)
        assert found["scorers"][name]["neither"] == pytest.approx(1 - right / 11)
    assert found["scorers"]["lmms-eval"]["yes_ratio"] == 0.5  # of the gold answers
    assert found["scorers"]["lmms-eval"]["recall"] == pytest.approx(
        1 / 4
    )  # of 11: "Yes" alone, "no", "no", "NO"
    assert leftovers(found) == []


def test_the_command_prints_the_table_and_every_reason(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "predictions.jsonl"
    file.write_text("\n".join(map(json.dumps, records(Y))), encoding="utf-8")
    assert main([str(file), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said == (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert all(f"**{key}**: {text}" in said for key, text in WHY.items() if key != "ranked or not asked")
    assert "8 answers are taken differently" in said and "the same numbers" in said
    assert (tmp_path / "out" / "by_hand.csv").read_text(encoding="utf-8").startswith("yes/0,yes,Yes")
    assert main([str(file), "--suite", "t"]) == 2 and "there are s" in capsys.readouterr().err


def test_of_twenty_right_answers_lmms_eval_counts_eight(tmp_path: Path) -> None:
    """The number of docs/evaluation.md, on the list that our scorers' golden test has."""
    twenty = runpy.run_path(str(Path(__file__).parents[1] / "evaluation" / "test_scorers_pope.py"))["RIGHT"]
    asked = [{**records(gold)[0], "id": str(i), "output": said} for i, (said, gold) in enumerate(twenty)]
    found = compare(asked, tmp_path)["scorers"]
    counted = {name: round(20 * numbers["accuracy"]) for name, numbers in found.items()}
    assert list(counted.values())[:3] == [20, 20, 8]
