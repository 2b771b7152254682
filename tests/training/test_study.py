"""Studies: the grid of cells, what they share, runs side by side, and going on after a kill."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.models.errors import UserError
from opsin.training import cli
from opsin.training.run_folder import RunFolder
from opsin.training.study import executor
from opsin.training.study.executor import Planned, _Board
from opsin.training.study.runs import Run, runs_of, same_as
from opsin.training.study.spec import Cell, grid, load_study, of_toggles

import runs

METHODS = ["jarvis", "l2t", "ross", "vift"]
SUITES = {
    "batch_size": 32,
    "suites": {
        "scenes": {"split": "uniform", "samples": 12, "seed": 18, "objects": [1, 2], "charts": 0, "sign": 0, "kinds": ["colour", "size"]},
    },
}  # fmt: skip


def study(**more: Any) -> Any:
    return of_toggles(
        ["base.yaml"],
        ["max_duration=3ba"],
        METHODS,
        subsets="all",
        seeds=[1, 2],
        overlays={},
        evaluation=["e.yaml"],
        **more,
    )


def test_all_subsets_are_cells_and_differ_in_toggles_alone() -> None:
    cells = grid(study())
    expected = [c for size in range(5) for c in itertools.combinations(METHODS, size)]
    assert [c.methods for c in cells] == expected and cells[0].role == "baseline"
    for cell in cells:
        on = [f"algorithms.{m}={'true' if m in cell.methods else 'false'}" for m in METHODS]
        assert (
            cell.files == ("base.yaml",)
            and cell.arguments == ("max_duration=3ba", *on)
            and cell.seeds == (1, 2)
        )


@pytest.mark.parametrize(("subsets", "count"), [("singles", 5), ("pairs", 11), ("all", 16)])
def test_subsets(subsets: str, count: int) -> None:
    wanted = of_toggles(
        ["b.yaml"], [], METHODS, subsets=subsets, seeds=[1], overlays={"half": ["half.yaml"]}, evaluation=[]
    )
    cells = grid(wanted)
    assert len(cells) == count + 1 and len({c.name for c in cells}) == len(cells)
    half = next(c for c in cells if c.name == "half")
    assert half.files == ("b.yaml", "half.yaml") and half.methods == () and half.role == "control"
    assert "algorithms.ross=false" in half.arguments


def test_tries_are_told_of_every_cell_that_has_the_method(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    cells = {"placebo": {"methods": ["ross"]}, "own": {"methods": ["ross"], "tries": 9}, "plain": {}}
    file.write_text(
        yaml.safe_dump(
            {"base": ["b.yaml"], "factorial": ["ross", "l2t"], "tries": {"ross": 4, "l2t": 2}, "cells": cells}
        )
    )
    told = {cell.name: cell.tries for cell in grid(load_study([str(file)]))}
    assert told == {"baseline": 1, "ross": 4, "l2t": 2, "l2t+ross": 4, "placebo": 4, "own": 9, "plain": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"base": []}, "study: base: needs at least one YAML"),
        ({"cells": {}}, "nothing is held against the baseline"),
        ({"seeds": [1, 1]}, r"study: seeds: \[1, 1\]"),
        ({"along": {"rosss": []}, "cells": {"x": {"methods": ["ross"]}}}, r"study: along\.rosss: no cell has it; did you mean 'ross'"),
        ({"tries": {"rosss": 4}, "cells": {"x": {"methods": ["ross"]}}}, r"study: tries\.rosss: no cell has it; did you mean 'ross'"),
        ({"tries": {"ross": 0}, "cells": {"x": {"methods": ["ross"]}}}, r"study: tries\.ross: 0: what was taken was tried, so 1 or more"),
        ({"tries": {"ross": 0}, "cells": {"x": {"methods": ["ross"], "tries": 2}}}, r"study: tries\.ross: 0: what was taken"),
        ({"cells": {"x": {"tries": 0}}}, r"study: cells\.x\.tries: 0: what was taken"),
        ({"cells": {"x": {"rolle": "single"}}}, r"cells\.x\.rolle: unknown key; did you mean 'role'"),
        ({"cells": {"x": {"role": "controll"}}}, r"cells\.x\.role: 'controll': unknown; did you mean 'control'"),
        ({"cells": {"x": {"placebo_of": "rosss"}, "ross": {}}}, r"placebo_of: no other cell 'rosss'; did you mean 'ross'"),
        ({"cells": {"x": {"matched_to": "x"}}}, r"matched_to: no other cell 'x'"),
        ({"cells": {"x": {"seeds": 3}}}, r"cells\.x\.seeds: 3: the study has 2"),
        ({"cells": {"x": {"matched_to": "y"}, "y": {"seeds": 1}}}, r"cells\.x\.seeds: 2, but y, against which it is held, has 1"),
        ({"factorial_seeds": 1}, "factorial_seeds: there is no factorial"),
        ({"factorial": ["ross"], "factorial_seeds": 3}, "factorial_seeds: 3: the study has 2"),
        ({"factorial": ["ross"], "cells": {"baseline": {"seeds": 1}}}, "factorial_seeds: 2, but baseline, against which it is held, has 1"),
        ({"cells": {"../x": {}}}, "use a plain name"),
        ({"factorial": ["ross"], "cells": {"ross": {}}}, r"cells\.ross: is a cell of the factorial already"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_study_is_one_line(tmp_path: Path, body: dict[str, Any], message: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"base": ["b.yaml"], "seeds": [1, 2], "cells": {"a": {}}, **body}))
    with pytest.raises(UserError, match=message) as refused:
        load_study([str(file)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["b.yaml", "--toggle", "rosss"], "--toggle rosss: unknown method; did you mean 'ross'"),
        (["b.yaml", "--toggle", "ross", "ross"], "a method is named twice"),
        (
            ["b.yaml", "--toggle", "ross", "--subsets", "single"],
            "--subsets 'single': unknown; did you mean 'singles'",
        ),
        (["b.yaml", "--toggle", "ross", "--overlay", "x"], "use NAME=YAML"),
        (["b.yaml", "--toggle", "ross", "--primary", "x"], "use SUITE/MEASURE"),
        (["b.yaml", "--toggle", "ross"], "gives no YAML of `opsin eval`"),
    ],
)
def test_what_is_typed_wrong_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr("sys.argv", ["opsin", "ablate", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2 and message in said and said.count("\n") == 1


class Stage:
    def __init__(self, identity: str):
        self.identity, self.name = identity, identity


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 4),
    st.randoms(),
)
def test_a_shared_stage_is_made_by_one_run_at_a_time(
    shared: list[tuple[str, bool]], hands: int, chance: Any
) -> None:
    # Cells that differ in how they are asked share the last stage as well: here two and two.
    plans = [
        Planned(
            Run(Cell(f"c{i}", (), (), (), "single", (1,)), 1, Path("x"), ()),
            [Stage(s), Stage(f"last {s}{i // 2}")],
            "",
            shares,
        )  # type: ignore[list-item]
        for i, (s, shares) in enumerate(shared)
    ]
    told: list[str] = []
    board = _Board(list(plans), lambda run, answer: told.append(run.name))
    there: set[tuple[str, str]] = set()  # whose folder, which stage
    working: list[Planned] = []

    def left(planned: Planned) -> list[str]:
        taken = {stage for name, stage in there if planned.shares or name == planned.run.name}
        return [s.identity for s in planned.stages if s.identity not in taken]

    def made_by(run: Run, stage: Any) -> bool:
        return (run.name, stage.identity) in there

    def finished(run: Run, stage: Any) -> bool:
        return any(one == stage.identity for _, one in there)

    with mock.patch.multiple(executor, made_by=made_by, finished=finished, LOOK=0):
        while board.waiting or working:
            # Only take while something can be taken: a single thread must not wait for itself.
            wanted = {one for one, maker in board.making.items() if (maker.run.name, one) not in there}
            free = [
                p for p in board.waiting if not p.shares or wanted.isdisjoint(s.identity for s in p.stages)
            ]
            if len(working) < hands and free:
                taken = board.take()
                assert taken is free[0], "the first that need not wait"
                others = [p for p in working if p.shares]
                assert not taken.shares or not {one for p in others for one in left(p)} & {*left(taken)}
                working.append(taken)
                continue
            one = chance.choice(working)
            if (todo := left(one)) and chance.random() < 0.8:
                there.add((one.run.name, todo[0]))  # a stage at a time: others may go on from the first one
            else:  # done, or failed, also after its first stage
                working.remove(one)
                board.give(one, {"status": "failed" if todo else "done"})
    assert sorted(told) == sorted(p.run.name for p in plans) and not board.making


def test_who_takes_nothing_from_others_does_not_wait_for_them() -> None:
    stage: Any = Stage("s")
    plans = [
        Planned(Run(Cell(name, (), (), (), "single", (1,)), 1, Path("nowhere"), ()), [stage], "", shares)
        for name, shares in (("a", True), ("b", False))
    ]
    board = _Board(list(plans), lambda run, answer: None)
    assert board.take() is plans[0] and board.take() is plans[1]
    board.give(plans[1], {"status": "failed"})
    assert board.making == {"s": plans[0]}, "made by the first one, whoever else made it for itself"


def test_a_stage_is_taken_while_the_run_that_made_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "LOOK", 0.01)
    first: Any = Stage("s")
    plans = [
        Planned(Run(Cell(name, (), (), (), "single", (1,)), 1, tmp_path, ()), [first], "") for name in "ab"
    ]
    board = _Board(list(plans), lambda run, answer: None)
    assert board.take() is plans[0]
    got: list[Planned | None] = []
    waiting = threading.Thread(target=lambda: got.append(board.take()), daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not got
    folder = RunFolder(tmp_path / "runs", plans[0].run.name)
    model = folder.stage(first.name) / "model"
    model.mkdir(parents=True)
    (folder.stage(first.name) / "done.json").write_text("{")  # half a file: not there yet
    waiting.join(0.2)
    assert waiting.is_alive()
    (model / "config.json").write_text("{}")
    folder.mark_finished(first, model)
    waiting.join(10)
    assert got == [plans[1]] and plans[0].run.name not in {p.run.name for p in board.waiting}


def test_nobody_waits_for_a_run_whose_end_could_not_be_told() -> None:
    run = Run(Cell("c", (), (), (), "single", (1,)), 1, Path("nowhere"), ())
    plans = [Planned(run, [Stage("a")], ""), Planned(run, [Stage("a")], "")]  # type: ignore[list-item]

    def full(run: Run, answer: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    board = _Board(list(plans), full)
    taken = board.take()
    assert taken is not None
    with pytest.raises(OSError, match="No space left"):
        board.give(taken, {"status": "failed"})
    assert not board.making and board.take() is plans[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> Path:
    """A base with two stages and two methods that are toggled, and questions to ask."""
    folder = tmp_path_factory.mktemp("study")
    captions = runs.write_scenes(folder / "captions", 32, stream="caption")
    text = runs.write_scenes(folder / "text", 32, stream="text")
    stages = {
        "align": {"max_duration": "3ba", "chat_template": "plain", "train_loader": {"num_workers": 0, "dataset": {"remote": captions}}},
        "instruct": {"max_duration": "4ba"},
    }  # fmt: skip
    methods = {"l2t": {"template_source": "none", "enabled": False}, "vift": {"enabled": False}}
    runs.config_file(folder, scenes, "base.yaml", stages=stages, algorithms=methods, save_interval="100ba")
    streams = {"captions": {"remote": captions, "kind": "caption"}, "text": {"remote": text, "kind": "text"}}
    mixed = {"stages": {"instruct": {"train_loader": {"dataset": {"remote": None, "streams": streams}}}}}
    (folder / "mixed.yaml").write_text(yaml.safe_dump(mixed))
    (folder / "suites.yaml").write_text(yaml.safe_dump(SUITES))
    return folder


def test_a_cell_that_is_another_one_is_not_trained(base: Path, tmp_path: Path) -> None:
    files = [str(base / "base.yaml"), str(base / "mixed.yaml")]
    wanted = of_toggles(
        files,
        [],
        ["l2t", "vift"],
        subsets="all",
        seeds=[1, 2],
        overlays={},
        evaluation=[str(base / "suites.yaml")],
    )
    equal = same_as(runs_of(wanted, tmp_path))
    assert (
        list(equal) == ["l2t+vift"]
        and equal["l2t+vift"][0] == "vift"
        and "l2t does nothing beside vift" in equal["l2t+vift"][1]
    )
    both = of_toggles(
        files,
        ["algorithms.l2t.on_text_only=true"],
        ["l2t", "vift"],
        subsets="all",
        seeds=[1],
        overlays={},
        evaluation=[],
    )
    assert same_as(runs_of(both, tmp_path)) == {}


def test_it_is_another_one_only_with_the_same_settings_and_questions(base: Path, tmp_path: Path) -> None:
    body = {
        "base": [str(base / "base.yaml"), str(base / "mixed.yaml")], "seeds": [1],
        "cells": {
            "vift": {"methods": ["vift"]},
            "slow": {"methods": ["vift"], "set": ["max_duration=7ba"]},
            "both": {"methods": ["l2t", "vift"]},
            "both_asked": {"methods": ["l2t", "vift"], "evaluation": ["blind=false"]},
        },
    }  # fmt: skip
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(body))
    equal = same_as(runs_of(load_study([str(file)]), tmp_path))
    assert {name: other for name, (other, _) in equal.items()} == {"both": "vift"}


def test_cells_that_are_asked_in_their_own_way_are_trained_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {
        "base": [str(base / "base.yaml")], "seeds": [17], "evaluation": [str(base / "suites.yaml"), "limit=20"],
        "cells": {"asked": {"evaluation": ["blind=false"]}},
    }  # fmt: skip
    file, out = tmp_path / "s.yaml", tmp_path / "study"
    file.write_text(yaml.safe_dump(body))
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr("sys.argv", ["opsin", "study", "run", str(file), "--out", str(out), "--jobs", "1"])
    cli.main()
    cells = study_cells(out)
    assert {c["status"] for c in cells.values()} == {"done"}
    asked = (out / "cells" / "baseline-17" / "predictions.jsonl").read_text().splitlines()
    assert len([one for one in asked if json.loads(one)["suite"] == "scenes"]) == 20
    last = json.loads((out / "runs" / "asked-17" / "stages" / "instruct" / "done.json").read_text())
    assert "baseline-17" in last["taken_from"]
    scores = {
        n: json.loads((out / "cells" / n / "scores.json").read_text())["suites"]["scenes"] for n in cells
    }
    assert "blind" in scores["baseline-17"] and "blind" not in scores["asked-17"]
    assert scores["baseline-17"]["measures"] == scores["asked-17"]["measures"]
    tokens = {c["cost"]["tokens"] for c in cells.values()}
    assert len(tokens) == 1 and tokens.pop() > 0
    # What was fixed before the first run stays fixed.
    with pytest.raises(SystemExit) as left:
        monkeypatch.setattr(
            "sys.argv",
            [
                "opsin",
                "study",
                "run",
                str(file),
                "--out",
                str(out),
                "primary.suite=scenes",
                "primary.measure=accuracy",
            ],
        )
        cli.main()
    assert left.value.code == 2


def command(base: Path, out: Path) -> list[str]:
    toggles = ["--toggle", "l2t", "--seeds", "2", "--jobs", "1", "--evaluation", str(base / "suites.yaml")]
    return ["ablate", str(base / "base.yaml"), *toggles, "--out", str(out)]


def study_cells(out: Path) -> dict[str, dict[str, Any]]:
    return {f"{c['name']}-{c['seed']}": c for c in json.loads((out / "study.json").read_text())["cells"]}


def test_a_study_is_trained_asked_and_reported_and_goes_on_after_a_kill(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "study"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "opsin.training.cli", *command(base, out)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    first = out / "cells" / "baseline-17" / "cell.json"
    try:
        deadline = time.monotonic() + 240
        while not first.is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    kept = (
        first.read_bytes(),
        (out / "runs" / "baseline-17" / "model" / "model.safetensors").stat().st_mtime_ns,
    )
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr("sys.argv", ["opsin", *command(base, out)])
    cli.main()
    assert kept == (
        first.read_bytes(),
        (out / "runs" / "baseline-17" / "model" / "model.safetensors").stat().st_mtime_ns,
    )
    cells = study_cells(out)
    assert list(cells) == ["baseline-17", "l2t-17", "baseline-18", "l2t-18"]
    assert {c["status"] for c in cells.values()} == {"done"}
    assert all(c["cost"]["steps"] == 7 and c["cost"]["seconds"] > 0 for c in cells.values())
    taken = json.loads((out / "runs" / "l2t-17" / "stages" / "align" / "done.json").read_text())
    assert "baseline-17" in taken["taken_from"]
    assert (out / "report.html").is_file() and (out / "ablation.json").is_file()
    for name in cells:
        assert json.loads((out / "cells" / name / "scores.json").read_text())["suites"]["scenes"]["measures"]
    # Results of other settings are not taken for these.
    with pytest.raises(SystemExit) as left:
        monkeypatch.setattr("sys.argv", ["opsin", *command(base, out), "max_duration=5ba"])
        cli.main()
    assert left.value.code == 2
