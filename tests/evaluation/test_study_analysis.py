"""A study's folder -> ``ablation.json``: verdicts, placebos, what is missing, and what may not change anything."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from opsin.evaluation.study import __main__ as command
from opsin.evaluation.study import analyse
from opsin.evaluation.study.analyse import ABLATION, write_analysis
from opsin.evaluation.study.bootstrap import Estimate
from opsin.evaluation.study.folder import Cell
from opsin.evaluation.study.verdicts import floor_and_ceiling, verdict
from opsin.models.errors import UserError

from studies import StudyMaker, cell, suite_items

PAIRS = {"minimal_pairs": 300}
KEY = "minimal_pairs/pair_accuracy"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factorial of two, placebos that do something and nothing, a failed run, a repeated cell."""
    folder = tmp_path_factory.mktemp("study")
    StudyMaker(
        folder,
        [
            cell("baseline", (), "baseline"),
            cell("l2t", ["l2t"], "factorial", skill=1.5),
            cell("ross", ["ross"], "factorial", skill=1.5),
            cell("ross+l2t", ["ross", "l2t"], "factorial", skill=4.0),
            cell("other words", ["l2t"], "placebo", placebo_of="l2t", skill=0.0),
            cell("shuffled", ["ross"], "placebo", placebo_of="ross", skill=1.5),
            cell("worse", ["vift"], "single", skill=-2.0),
            cell("broken", ["jarvis"], "single", skill=1.5, at={18: {"status": "failed", "why": "not a number"}}),
            cell("gone", ["jarvis"], "single", at={s: {"status": "missing", "why": "not run"} for s in (17, 18, 19)}),
            cell("same", ["l2t", "vift"], "single", at={s: {"status": "identical", "identical_to": "l2t", "folder": None} for s in (17, 18, 19)}),
            cell("twice", (), "positive", skill=0.0, placebo_of=None),
        ],
        {**PAIRS, "conflict": 20}, factors=("ross", "l2t"), seed_sd=0.0,
        secondary=[("conflict", "balanced_accuracy"), ("minimal_pairs", "nll")],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def found(study: Path) -> dict[str, Any]:
    return analyse(study)


def words(found: dict[str, Any], key: str = KEY) -> dict[str, str]:
    rows = found["endpoints"][key]["cells"]
    return {name: row["verdict"]["word"] for name, row in rows.items() if row["verdict"]}


def test_a_method_helps_only_if_it_beats_its_placebo(found: dict[str, Any]) -> None:
    said = words(found)
    assert said["l2t"] == "helps"
    assert said["ross"] == "none"
    assert "not than its placebo shuffled" in found["endpoints"][KEY]["cells"]["ross"]["verdict"]["why"]
    assert (
        found["endpoints"][KEY]["cells"]["ross"]["placebos"]["shuffled"]["value"] == 0
    )  # equal skill, equal answers
    assert said["ross+l2t"] == "helps"  # better than the placebos of both
    assert set(found["cells"]["ross+l2t"]["placebos"]) == {"other words", "shuffled"}
    assert said["shuffled"] == "better"
    assert said["worse"] == "harms"
    assert "baseline" not in said


def test_missing_failed_and_repeated_runs_are_named_and_not_judged(found: dict[str, Any]) -> None:
    said, rows = words(found), found["endpoints"][KEY]["cells"]
    assert (said["broken"], said["gone"], said["same"]) == ("unjudged",) * 3
    assert rows["broken"]["verdict"]["why"] == "1 of its planned seeds is missing (18)"
    assert rows["broken"]["difference"]["seeds"] == [17, 19]  # the number is shown, with what it rests on
    assert rows["gone"]["level"] is None
    assert rows["same"]["verdict"]["why"] == "identical to l2t by construction"
    assert rows["same"]["difference"] == rows["l2t"]["difference"]
    assert "broken, seed 18: failed: not a number" in found["problems"]
    assert [p for p in found["problems"] if p.startswith("gone")] == [
        f"gone, seed {s}: missing: not run" for s in (17, 18, 19)
    ]
    assert found["cells"]["gone"]["missing"] == [17, 18, 19]


def test_a_positive_control_that_shows_nothing_is_an_alarm(found: dict[str, Any]) -> None:
    assert any("positive control twice is not clearly better" in alarm for alarm in found["alarms"])


def test_every_difference_has_an_interval_and_what_it_rests_on(found: dict[str, Any]) -> None:
    for result in found["endpoints"].values():
        for name, row in result["cells"].items():
            gap = row["difference"]
            if gap is None:
                continue
            assert gap["low"] <= gap["value"] <= gap["high"], (result["measure"], name)
            assert gap["n"] > 0 and gap["pictures"] > 1 and gap["over"] == "seeds and pictures"
            assert (gap["low"] > 0 or gap["high"] < 0) <= (
                gap["p"] < 0.05
            )  # an interval without 0 is never luck by p
            assert gap["value"] == pytest.approx(sum(gap["by_seed"]) / len(gap["by_seed"]))


def test_effects_are_differences_of_the_cells(found: dict[str, Any]) -> None:
    result = found["endpoints"][KEY]
    level = {name: row["level"]["value"] for name, row in result["cells"].items() if row["level"]}
    effects = {tuple(e["factors"]): e["effect"] for e in result["effects"]}
    assert set(effects) == {("ross",), ("l2t",), ("ross", "l2t")}
    both = level["ross+l2t"] - level["ross"] - level["l2t"] + level["baseline"]
    assert effects["ross", "l2t"]["value"] == pytest.approx(both)
    main = (level["ross+l2t"] - level["l2t"] + level["ross"] - level["baseline"]) / 2
    assert effects["ross",]["value"] == pytest.approx(main)


def test_secondary_endpoints_are_corrected_within_a_cell(found: dict[str, Any]) -> None:
    rows = {key: found["endpoints"][key]["cells"]["l2t"] for key in found["secondary"]}
    p = sorted(row["difference"]["p"] for row in rows.values())
    assert sorted(row["holm_p"] for row in rows.values()) == pytest.approx(
        sorted([min(1, 2 * p[0]), max(2 * p[0], p[1])])
    )
    assert "holm_p" not in found["endpoints"][KEY]["cells"]["l2t"]
    nll = found["endpoints"]["minimal_pairs/nll"]
    assert nll["better"] == -1 and nll["cells"]["worse"]["difference"]["value"] > 0
    assert words(found, "minimal_pairs/nll")["worse"] == "harms"


def test_numbers_are_those_of_the_runs_scores(study: Path, found: dict[str, Any]) -> None:
    for seed, value in zip(
        (17, 18, 19), found["endpoints"][KEY]["cells"]["l2t"]["level"]["by_seed"], strict=True
    ):
        scores = json.loads((study / f"cells/l2t-{seed}/scores.json").read_text())
        assert value == pytest.approx(scores["suites"]["minimal_pairs"]["measures"]["pair_accuracy"]["value"])
    assert found["checked"] > 50


def test_costs_contributions_and_curves_are_there(found: dict[str, Any]) -> None:
    assert found["costs"]["l2t"]["seconds_a_step"]["ratio"]["value"] == pytest.approx(1)
    assert found["contribution"]["worse"]["vc/other"]["difference"]["value"] < 0
    assert found["contribution"]["l2t"]["accuracy"]["seeds"] == [17, 18, 19]
    curve = found["curves"]["l2t"]
    assert curve["stages"] == {"align": 0, "instruct": 120}
    assert all(
        low <= mean <= high
        for low, mean, high in zip(curve["low"], curve["mean"], curve["high"], strict=True)
    )
    assert "same" not in found["curves"]


def test_the_order_of_cells_and_lines_changes_nothing(
    study: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(study, tmp_path / "study")
    path = tmp_path / "study/study.json"
    plan, drawn = json.loads(path.read_text()), random.Random(1)
    drawn.shuffle(plan["cells"])
    path.write_text(json.dumps(plan))
    for file in (tmp_path / "study").glob("cells/*/predictions.jsonl"):
        lines = file.read_text().splitlines()
        drawn.shuffle(lines)
        file.write_text("\n".join(lines) + "\n")
    other = analyse(tmp_path / "study")
    a, b = write_analysis(tmp_path, found).read_text(), write_analysis(tmp_path / "study", other).read_text()
    assert a == b
    assert json.loads(b)["name"] == "made up"


def test_one_seed_says_so_in_every_row(tmp_path: Path) -> None:
    StudyMaker(
        tmp_path,
        [cell("baseline", (), "baseline"), cell("l2t", ["l2t"], skill=2.0)],
        PAIRS,
        seeds=(17,),
        blind=None,
    )
    found = analyse(tmp_path)
    row = found["endpoints"][KEY]["cells"]["l2t"]
    assert row["difference"]["over"] == "pictures" and row["difference"]["low"] > 0
    assert row["verdict"]["word"] == "better" and "no placebo was run" in row["verdict"]["why"]
    assert any("one seed" in alarm for alarm in found["alarms"])
    assert "whether the baseline is above chance is not known" in found["endpoints"][KEY]["room"]["why"]
    assert row["difference"]["variance"]["seed"] == 0


@pytest.mark.parametrize("base", [0.3, 0.8])
def test_not_asked_blind_a_share_is_held_against_chance(tmp_path: Path, base: float) -> None:
    maker = StudyMaker(
        tmp_path, [cell("baseline", (), "baseline"), cell("l2t", ["l2t"])], {"text": 60},
        primary=("text", "accuracy"), secondary=[("text", "nll")], blind=None, base=base,
    )  # fmt: skip
    choices = [len(item.choices) for item in suite_items("text", 60)]
    expected = sum(1 / n for n in choices) / len(choices)
    assert min(choices) > 1
    found = analyse(tmp_path)
    room = found["endpoints"]["text/accuracy"]["room"]
    assert room["chance"] == pytest.approx(expected) and room["blind"] is None
    assert room["status"] == ("judged" if base > 0.5 else "floor")
    assert found["endpoints"]["text/nll"]["room"]["chance"] is None
    # One question with free answers, and chance is not known.
    for run in (maker.folder / "cells").iterdir():
        lines = (run / "predictions.jsonl").read_text().splitlines()
        first = json.loads(lines[0])
        first["choices"] = []
        (run / "predictions.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    assert analyse(tmp_path)["endpoints"]["text/accuracy"]["room"]["chance"] is None


def test_other_questions_are_left_out_and_told(tmp_path: Path) -> None:
    StudyMaker(
        tmp_path, [cell("baseline", (), "baseline"), cell("l2t", ["l2t"], skill=1.0), cell("x", ["x"])], PAIRS
    )
    path = tmp_path / "cells/l2t-18/predictions.jsonl"
    first, *lines = path.read_text().splitlines()
    first = json.dumps({**json.loads(first), "question": "<image>\nWhat is there?"})
    path.write_text("\n".join([first, *lines]) + "\n")
    found = analyse(tmp_path)
    rows = found["endpoints"][KEY]["cells"]
    assert rows["l2t"]["difference"]["pictures"] == rows["x"]["difference"]["pictures"] - 1
    assert any(
        p.startswith("l2t, seed 18: minimal_pairs: other questions than the other runs about 1 of")
        for p in found["problems"]
    )


def test_a_run_whose_files_cannot_be_read_counts_as_failed(tmp_path: Path) -> None:
    StudyMaker(tmp_path, [cell("baseline", (), "baseline"), cell("l2t", ["l2t"])], PAIRS)
    (tmp_path / "cells/l2t-18/predictions.jsonl").write_text("{")
    (tmp_path / "cells/l2t-19/scores.json").unlink()
    found = analyse(tmp_path)
    assert found["cells"]["l2t"]["missing"] == [18, 19]
    assert [run["status"] for run in found["cells"]["l2t"]["runs"]] == ["done", "failed", "failed"]
    assert any("cells/l2t-18/predictions.jsonl:1: no JSON" in p for p in found["problems"])
    assert any(
        "cells/l2t-19/scores.json: cannot be read (No such file or directory)" in p for p in found["problems"]
    )


def test_scores_of_other_predictions_are_refused(tmp_path: Path) -> None:
    StudyMaker(tmp_path, [cell("baseline", (), "baseline"), cell("l2t", ["l2t"], skill=2.0)], PAIRS)
    shutil.copy(tmp_path / "cells/l2t-17/scores.json", tmp_path / "cells/baseline-17/scores.json")
    with pytest.raises(
        UserError, match=r"cells/baseline-17: minimal_pairs/pair_accuracy is .* they are of different runs"
    ):
        analyse(tmp_path)


def test_what_makes_a_comparison_unfair_is_named(tmp_path: Path) -> None:
    made = StudyMaker(
        tmp_path, [cell("baseline", (), "baseline"), cell("l2t", ["l2t"])], PAIRS, seeds=(17, 18)
    )
    assert not analyse(tmp_path)["problems"]
    rows = {(row["name"], row["seed"]): row for row in made.study["cells"]}
    rows["l2t", 17]["tries"] = 9
    rows["l2t", 18]["cost"]["tokens"] *= 1.5
    made.write()
    path = tmp_path / "cells/l2t-18/scores.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch": "2.7.0"}))
    assert analyse(tmp_path)["problems"] == [
        "runs were scored by unlike versions: not told; torch 2.7.0",
        "cells were tuned with unlike numbers of tries: baseline 4, l2t 9",
        "l2t: 600,000 tokens, baseline 400,000: not matched",
    ]


BAD: list[tuple[str, Any]] = [
    ("baseline 'base': no such", {"baseline": "base"}),
    ("primary", {"primary": {"suite": "minimal_pairs"}}),
    ("is an endpoint twice", {"secondary": [{"suite": "minimal_pairs", "measure": "pair_accuracy"}]}),
    ("no measure 'pair_acc'", {"primary": {"suite": "minimal_pairs", "measure": "pair_acc"}}),
    ("name each once", {"factors": ["a", "a"]}),
    ("'cells' is missing", {"cells": None}),
]


@pytest.mark.parametrize("change", [one for _, one in BAD], ids=[words for words, _ in BAD])
def test_a_plan_that_cannot_be_is_refused_in_one_line(
    study: Path, tmp_path: Path, change: dict[str, Any], capsys: Any
) -> None:
    plan = json.loads((study / "study.json").read_text()) | change
    plan = {key: value for key, value in plan.items() if value is not None}
    (tmp_path / "study.json").write_text(json.dumps(plan))
    (tmp_path / "cells").symlink_to(study / "cells")
    assert command.main([str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("opsin: ") and told.count("\n") == 1


@pytest.mark.parametrize(
    "change, told",
    [
        ({"role": "singel"}, "role 'singel'.*single"), ({"status": "dun"}, "status 'dun'.*done"), ({"folder": None}, "names no folder"),
        ({"placebo_of": "l3t"}, "placebo_of 'l3t': no such cell.*l2t"), ({"seed": 18}, "a seed occurs twice"),
        ({"status": "identical", "identical_to": "nobody"}, "identical_to 'nobody'"),
    ],
)  # fmt: skip
def test_a_cell_that_cannot_be_is_named(
    study: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    plan = json.loads((study / "study.json").read_text())
    rows = [row for row in plan["cells"] if row["name"] == "l2t"]
    for row in rows if {"role", "placebo_of"} & change.keys() else rows[:1]:
        row.update(change)
    (tmp_path / "study.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=told):
        analyse(tmp_path)


def level(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, low, high, 0.01, 5, 0.5, (17, 18), 100, 100, (value, value), {})


def test_floor_and_ceiling() -> None:
    assert floor_and_ceiling(level(0.5, 0.45, 0.55), 0.2, "share", 1)["status"] == "judged"
    assert floor_and_ceiling(level(0.5, 0.45, 0.55), 0.46, "share", 1)["status"] == "floor"
    assert floor_and_ceiling(level(0.3, 0.25, 0.35), 0.46, "share", 1)["status"] == "floor"
    assert floor_and_ceiling(level(0.98, 0.96, 1.0), 0.2, "share", 1)["status"] == "ceiling"
    assert floor_and_ceiling(level(0.02, 0.0, 0.03), 0.4, "share", -1)["status"] == "ceiling"
    assert floor_and_ceiling(level(0.3, 0.25, 0.35), 0.32, "share", -1)["status"] == "floor"
    assert floor_and_ceiling(level(0.3, 0.25, 0.35), 0.5, "share", -1)["status"] == "judged"
    assert floor_and_ceiling(level(1.2, 1.1, 1.3), 2.0, "nats", -1)["status"] == "judged"
    assert floor_and_ceiling(None, 0.2, "share", 1)["status"] == "unknown"
    # Not asked blind: by chance, where that is known.
    assert floor_and_ceiling(level(0.3, 0.25, 0.35), None, "share", 1, chance=0.29)["status"] == "floor"
    assert floor_and_ceiling(level(0.4, 0.35, 0.45), None, "share", 1, chance=0.29)["why"] is None
    assert floor_and_ceiling(level(0.3, 0.25, 0.35), 0.1, "share", 1, chance=0.29)["status"] == "judged"
    assert "not known" in floor_and_ceiling(level(0.3, 0.25, 0.35), None, "share", 1)["why"]


def test_nothing_is_judged_at_the_floor_and_nothing_claimed_against_holm() -> None:
    one = Cell("l2t", ("l2t",), "single", None, "baseline", ())
    gap, room = level(0.1, 0.05, 0.15), {"status": "judged", "why": None}

    def told(room: dict[str, Any], corrected: float | None) -> Any:
        return verdict(one, room, gap, {}, 1, missing=(), identical_to=None, corrected=corrected)

    assert told(room, None).word == "better"
    assert told(room, 0.2).word == "none" and "Holm" in told(room, 0.2).why
    assert told({"status": "floor", "why": "so"}, None).word == "unjudged"


def test_the_statistics_need_no_torch(study: Path) -> None:
    import subprocess

    code = f"import sys; from opsin.evaluation.study import write_study_report; print(write_study_report({str(study)!r})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(study / "report.html"), "False"]
    assert (study / ABLATION).is_file()
