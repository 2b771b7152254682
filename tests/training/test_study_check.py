"""What must hold before a study's cells are trained: probes, controls, and what happens where a line fails."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from opsin.evaluation.study import planned
from opsin.models.errors import UserError
from opsin.training import cli
from opsin.training.eval_config import load_suites
from opsin.training.study.audit import audit, for_study, refuse_unasked, verdict_of
from opsin.training.study.lines import FAILS, OK, OPEN, read_check
from opsin.training.study.part_lines import part_lines
from opsin.training.study.reach import pictures_asked, reach
from opsin.training.study.run_lines import run_lines, runs_needed
from opsin.training.study.runs import runs_of
from opsin.training.study.spec import StudyConfig, load_study
from opsin.training.study.work import Work

import runs
import studies

PICTURES = {"samples": 60, "seed": 18, "objects": [2, 2], "charts": 0, "sign": 0}
SUITES = {
    "batch_size": 64,
    "blind": False,
    "suites": {
        "minimal_pairs": {"suite": "scenes", "split": "minimal_pairs", "ask": ["colour"], **PICTURES},
        "conflict": {"suite": "scenes", "split": ["aligned", "conflict"], **PICTURES},
    },
}
PRIMARY = {"suite": "minimal_pairs", "measure": "pair_accuracy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> Path:
    """A base with two methods that can be switched on, and questions to ask."""
    folder = tmp_path_factory.mktemp("checked")
    ross = {"target": {"name": "pixels", "cell": 16}, "objective": "mse", "enabled": False}
    methods = {"ross": ross, "l2t": {"template_source": "none", "enabled": False}}
    runs.config_file(
        folder, scenes, "base.yaml", algorithms=methods, max_duration="2ba", save_interval="100ba"
    )
    (folder / "suites.yaml").write_text(yaml.safe_dump(SUITES))
    return folder


def body(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "checked", "base": [str(folder / "base.yaml")], "seeds": [1, 2, 3], "evaluation": [str(folder / "suites.yaml")],
        "primary": PRIMARY,
        "cells": {"ross": {"methods": ["ross"]}, "l2t": {"methods": ["l2t"]}, "blind": {"role": "control", "seeds": 1},
                  "twice": {"role": "positive", "set": ["max_duration=3ba"]}}, **more,
    }  # fmt: skip


def config(folder: Path, to: Path, **more: Any) -> StudyConfig:
    to.mkdir(parents=True, exist_ok=True)
    (to / "study.yaml").write_text(yaml.safe_dump(body(folder, **more)))
    return load_study([str(to / "study.yaml")])


def work_of(wanted: StudyConfig, out: Path, **told: Any) -> Work:
    return Work(
        wanted, out, runs_of(wanted, out), {}, [], 1, Console(file=io.StringIO(), width=200), told=dict(told)
    )


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"target": {"of": "ross", "cell": "rosss", "colour": 0.9}}, "study: check.target.cell: no cell 'rosss'; did you mean 'ross'?"),
        ({"target": {"colour": 0.9}}, "study: check.target.of: needs the method whose target is meant"),
        ({"teacher": {"of": "jarvis", "position": 0.9}}, "study: check.teacher.cell: no cell is named 'jarvis'; say which cell's target is meant"),
        ({"target": {"of": "ross"}}, "study: check.target: asks nothing; give colour, shape, size, position"),
        ({"target": {"of": "ross", "colour": 95}}, "study: check.target.colour: 95: use a share from 0 to 1"),
        ({"tower": {"position_gap": 0.1}}, "study: check.tower.position_gap: needs check.teacher, below which position is to be read"),
        ({"blind": {"cell": "blnd", "aligned": 0.6}}, "study: check.blind.cell: no cell 'blnd'; did you mean 'blind'?"),
        ({"blind": {"cell": "blind"}}, "study: check.blind: asks nothing; give aligned or conflict"),
        ({"positive": {"cell": ""}}, "study: check.positive.cell: needs the name of a cell"),
        ({"scenes": 4, "tower": {"colour": 0.9}}, "study: check.scenes: 4: use 40 or more"),
        ({}, "study: check: asks nothing; give target, teacher, tower, blind or positive"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_one_line(
    folder: Path, tmp_path: Path, check: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        config(folder, tmp_path, check=check)
    assert str(refused.value).rstrip("?") == message.rstrip("?")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"primary": None, "check": {"positive": {"cell": "twice"}}}, "study: check.positive: needs primary: the endpoint by which it is better"),
        ({"power": {"seed_sd": 0.02}}, "study: power.disagreement: needs a value; both are assumed, or none"),
        ({"power": {"seed_sd": 0.02, "disagreement": 2}}, "study: power.disagreement: 2: use a share from 0 to 1"),
        ({"primary": None, "power": {"seed_sd": 0.02, "disagreement": 0.2}}, "study: power: needs primary: the endpoint that it is about"),
    ],
)  # fmt: skip
def test_what_needs_a_primary_endpoint_says_so(
    folder: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        config(folder, tmp_path, **more)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"target": {"of": "ross", "cell": "baseline", "colour": 0.9}}, "study: check.target.cell: cell baseline is trained without ross"),
        ({"target": {"of": "l2t", "colour": 0.9}}, "study: check.target.of: l2t predicts no target"),
        ({"target": {"of": "roß", "cell": "ross", "colour": 0.9}}, "study: check.target.of: 'roß': unknown method"),
        ({"blind": {"cell": "blind", "suite": "conflct", "aligned": 0.6}}, "study: check.blind.suite: the evaluation has no suite 'conflct'; did you mean 'conflict'"),
    ],
)  # fmt: skip
def test_what_no_run_could_answer_is_refused_before_any(
    folder: Path, tmp_path: Path, check: dict[str, Any], message: str
) -> None:
    wanted = config(folder, tmp_path, check=check)
    assert wanted.check is not None
    with pytest.raises(UserError) as refused:
        refuse_unasked(work_of(wanted, tmp_path), wanted.check)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_probe_reads_what_is_there_and_fails_on_what_is_not(folder: Path, tmp_path: Path) -> None:
    asked = {
        "scenes": 120, "target": {"of": "ross", "colour": 0.5}, "teacher": {"of": "ross", "cell": "ross", "position": 0.9},
        "tower": {"colour": 0.2, "position_gap": 0.3}, "blind": {"cell": "blind", "aligned": 0.6}, "positive": {"cell": "twice"},
    }  # fmt: skip
    wanted = config(folder, tmp_path, check=asked)
    assert wanted.check is not None
    work = work_of(wanted, tmp_path / "out")
    lines = audit(work, wanted.check, lambda _: None)
    by_key = {line.key: line for line in lines}
    assert list(by_key) == [
        "target.colour",
        "teacher.position",
        "tower.colour",
        "tower.position_gap",
        "blind.aligned",
        "positive",
    ]
    # Pixels show an object's colour, but not where it stands: that is where a patch is, not what is in it.
    colour, position = by_key["target.colour"], by_key["teacher.position"]
    assert colour.status == OK and colour.value is not None and colour.value > 0.6
    assert all(value < 0.35 for value in colour.beside.values()) and colour.n and 30 < colour.n < 90
    assert position.status == FAILS and position.value is not None and position.value < 0.7
    assert by_key["tower.position_gap"].status == FAILS
    # Where a probe fails nothing is trained.
    assert by_key["blind.aligned"].status == by_key["positive"].status == OPEN and not work.told
    assert verdict_of(lines) == "check: 2 of 6 lines fail: teacher.position, tower.position_gap"
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert written["ok"] is False and [line["key"] for line in written["lines"]] == list(by_key)
    assert read_check(tmp_path / "out", written["identity"]) == lines
    assert read_check(tmp_path / "out", "of other settings") is None
    assert for_study(work, wanted.check, lines)["status"] == "failed"
    assert for_study(work, wanted.check, None)["status"] == "left out"
    # The same again gives the same.
    assert part_lines(work, wanted.check) == lines[:4]


@pytest.mark.parametrize(("skill", "status"), [(2.5, OK), (0.0, FAILS), (-2.5, FAILS)])
def test_a_positive_control_must_be_better_outside_its_interval(
    folder: Path, tmp_path: Path, skill: float, status: str
) -> None:
    cells = [studies.cell("baseline", (), "baseline"), studies.cell("twice", (), "positive", skill=skill)]
    studies.StudyMaker(tmp_path / "out", cells, {"minimal_pairs": 60}, seeds=(1, 2, 3))
    wanted = config(folder, tmp_path, check={"positive": {"cell": "twice"}})
    assert wanted.check is not None
    work = work_of(wanted, tmp_path / "out")
    names = [f"{name}-{seed}" for seed in (1, 2, 3) for name in ("baseline", "twice")]
    assert runs_needed(work, wanted.check) == names
    work.told.update({name: {"status": "done"} for name in names})
    (line,) = run_lines(work, wanted.check)
    assert line.status == status and line.asked == "interval above 0"
    assert (
        line.low is not None
        and line.high is not None
        and line.value is not None
        and line.low < line.value < line.high
    )
    assert (line.low > 0) == (status == OK) and line.beside["baseline, another picture"] == pytest.approx(0.1)
    work.told["twice-2"] = {"status": "failed", "why": "out of memory"}
    (line,) = run_lines(work, wanted.check)
    assert (line.status, line.value, line.why) == (FAILS, None, "twice-2: out of memory")


def test_a_model_trained_blindly_is_right_by_habit_alone(folder: Path, tmp_path: Path) -> None:
    wanted = config(folder, tmp_path, check={"blind": {"cell": "blind", "aligned": 0.65, "conflict": 0.1}})
    assert wanted.check is not None
    work = work_of(wanted, tmp_path / "out")
    assert runs_needed(work, wanted.check) == ["blind-1"]  # one seed does
    scores = tmp_path / "out" / "cells" / "blind-1" / "scores.json"
    scores.parent.mkdir(parents=True)
    for aligned, conflict, statuses in (
        (0.65, 0.1, [OK, OK]),
        (0.64, 0.02, [FAILS, OK]),
        (0.9, 0.11, [OK, FAILS]),
    ):
        measures = {"aligned_accuracy": {"value": aligned, "n": 200, "standard_error": 0.03},
                    "conflict_accuracy": {"value": conflict, "n": 200, "standard_error": 0.02}}  # fmt: skip
        unseen = {"measures": {"aligned_accuracy": {"value": 0.6}, "conflict_accuracy": {"value": 0.05}}}
        scores.write_text(json.dumps({"suites": {"conflict": {"measures": measures, "blind": unseen}}}))
        work.told["blind-1"] = {"status": "done"}
        lines = run_lines(work, wanted.check)
        assert [line.status for line in lines] == statuses and [line.value for line in lines] == [
            aligned,
            conflict,
        ]
        assert [line.n for line in lines] == [200, 200] and lines[0].beside == {"another picture": 0.6}
    work.told.clear()
    assert [line.why for line in run_lines(work, wanted.check)] == ["blind-1: missing"] * 2


def test_the_plan_says_what_can_be_seen(folder: Path, tmp_path: Path) -> None:
    silent = work_of(config(folder, tmp_path), tmp_path)
    assert "nothing is assumed about noise" in reach(silent)
    work = work_of(config(folder, tmp_path, power={"seed_sd": 0.02, "disagreement": 0.25}), tmp_path)
    pairs = pictures_asked(work, "minimal_pairs")
    items = load_suites([str(folder / "suites.yaml")]).suites["minimal_pairs"].load()
    assert pairs == len({item.meta["pair"] for item in items}) > 2
    three, one = (planned(seeds, pairs, seed_sd=0.02, disagreement=0.25).effect for seeds in (3, 1))
    assert (
        f"{three:.3f} with 3 seeds, {one:.3f} with 1 seed (over pictures alone) ({pairs} pictures"
        in reach(work)
    )


def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr("sys.argv", ["opsin", "study", *words])
    code: Any = 0
    try:
        cli.main()
    except SystemExit as left:
        code = left.code or 0
    return int(code), capsys.readouterr().err


@pytest.mark.timeout(600)
def test_a_study_stops_where_its_check_fails_and_its_runs_are_used_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, file = tmp_path / "out", tmp_path / "study.yaml"
    cells = {"twice": {"role": "positive", "set": ["max_duration=3ba"]}, "l2t": {"methods": ["l2t"]}}
    check = {"scenes": 60, "tower": {"colour": 0.2}, "positive": {"cell": "twice"}}
    file.write_text(yaml.safe_dump(body(folder, seeds=[1], cells=cells, check=check)))
    where = (str(file), "--out", str(out), "--jobs", "1")
    code, said = typed(monkeypatch, capsys, "check", *where)
    assert code == 1 and said.splitlines()[-1] == "check: 1 of 2 lines fails: positive"
    assert sorted(p.name for p in (out / "cells").iterdir()) == [
        "baseline-1",
        "twice-1",
    ]  # and no cell of the study
    trained = {p: p.stat().st_mtime_ns for p in (out / "runs").glob("*/model/model.safetensors")}
    assert len(trained) == 2
    code, said = typed(monkeypatch, capsys, "run", *where)
    assert (
        code == 1
        and said.splitlines()[-1]
        == "check: 1 of 2 lines fails: positive; --without-check goes on all the same"
    )
    assert (
        not (out / "report.html").exists()
        and json.loads((out / "study.json").read_text())["check"]["status"] == "failed"
    )
    code, said = typed(monkeypatch, capsys, "run", *where, "--without-check")
    assert code == 0 and all(p.stat().st_mtime_ns == when for p, when in trained.items())
    found = json.loads((out / "ablation.json").read_text())
    assert found["check"]["status"] == "left out" and [x["key"] for x in found["check"]["lines"]] == [
        "tower.colour",
        "positive",
    ]
    alarm = "The check before the runs was left out, after it had failed: positive."
    assert found["alarms"][0].startswith(alarm)
    page = (out / "report.html").read_text()
    assert alarm in page and "looked at before any cell was trained" in page
    # What passes is not measured again.
    less = {"scenes": 60, "tower": {"colour": 0.2}}
    file.write_text(yaml.safe_dump(body(folder, seeds=[1], cells=cells, check=less)))
    for expected in ("check: passed, lines asked: 1", "check: passed before"):
        code, said = typed(monkeypatch, capsys, "check", *where)
        assert code == 0 and expected in said
    assert json.loads((out / "study.json").read_text())["check"]["status"] == "passed"
