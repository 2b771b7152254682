"""``--trial``: what a study will cost, from a few steps of every cell."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from opsin.models.errors import UserError
from opsin.training.schema import StageConfig
from opsin.training.study.executor import Planned
from opsin.training.study.runs import Run
from opsin.training.study.spec import Cell, load_study
from opsin.training.study.study import run_study
from opsin.training.study.trial import Cost, _show, steps_of

import runs


@dataclass
class Stage:
    identity: str
    name: str
    config: StageConfig


def plan(cell: str, align: str, instruct: str) -> Planned:
    run = Run(Cell(cell, (), (), (), "single", (1,)), 1, Path("x"), ())
    stages: Any = [
        Stage(align, "align", StageConfig(max_duration="100ba")),
        Stage(instruct, "instruct", StageConfig(max_duration="320sp", global_train_batch_size=16)),
    ]
    return Planned(run, stages, "")


def test_a_stage_that_cells_share_costs_once() -> None:
    plans = [plan("baseline", "a", "b"), plan("l2t", "a", "c"), plan("asked_otherwise", "a", "b")]
    costs = {
        (p.run.cell.name, s.name): Cost(2.0, 0.5 if s.name == "align" else 1.0)
        for p in plans
        for s in p.stages
    }
    said = io.StringIO()
    wall = _show(plans, costs, 10.0, 2, Console(file=said, width=160))
    align, instruct, asked = 2 + 100 * 0.5, 2 + 20 * 1.0, 3 * 10
    assert wall == pytest.approx((align + 2 * instruct + asked) / 2)
    assert re.search(r"baseline +\S+ align +\S+ +100 ", said.getvalue())
    assert "all 3 runs: 2 minutes of work, 1 minutes with 2 at a time" in said.getvalue()


def test_a_duration_that_says_nothing_of_steps_is_named() -> None:
    with pytest.raises(UserError, match="--trial: max_duration 100tok: use ba, sp or ep"):
        steps_of(StageConfig(max_duration="100tok"), 1)


@pytest.mark.slow
def test_it_trains_a_little_and_leaves_nothing(tmp_path: Path, scenes: str) -> None:
    runs.config_file(
        tmp_path, scenes, "base.yaml", max_duration="40ba",
        algorithms={"l2t": {"template_source": "none", "enabled": False}},
    )  # fmt: skip
    suites = {
        "scenes": {"split": "uniform", "samples": 6, "seed": 18, "charts": 0, "sign": 0, "kinds": ["colour"]}
    }
    (tmp_path / "suites.yaml").write_text(yaml.safe_dump({"batch_size": 32, "suites": suites}))
    body = {
        "base": [str(tmp_path / "base.yaml")],
        "seeds": [17],
        "evaluation": [str(tmp_path / "suites.yaml")],
        "cells": {"l2t": {"methods": ["l2t"]}},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(body))
    said = io.StringIO()
    out = tmp_path / "study"
    config = load_study([str(tmp_path / "s.yaml")])
    assert (
        run_study(config, out, jobs=1, plan_only=True, trial=True, console=Console(file=said, width=160)) == 0
    )
    assert re.search(r"l2t .* 40 ", said.getvalue()) and "all 2 runs:" in said.getvalue()
    assert not (out / "runs").exists() and not (out / "cells").exists()
