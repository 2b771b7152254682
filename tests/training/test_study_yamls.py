"""The studies that ship: each loads, has the grid that its head tells, and every cell of it is a run that would start."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from opsin.models.errors import UserError
from opsin.training.check import refuse_mistakes
from opsin.training.config import Loaded, to_plain
from opsin.training.eval_config import suites_of
from opsin.training.stages import resolve
from opsin.training.study.runs import Run, runs_of
from opsin.training.study.spec import Cell, grid, load_study
from opsin.training.study.study import run_study

FOLDER = Path(__file__).resolve().parents[2] / "yamls" / "studies"
NAMES = sorted(p.stem for p in FOLDER.glob("*.yaml") if "base" in yaml.safe_load(p.read_text()))
"""The other files are bases, overlays and questions."""
KL_VQ = ["studies/ross_targets.yaml", "studies/ross_targets_kl_vq.yaml"]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data, no parts, and a folder in which nothing may appear."""
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def head(name: str) -> str:
    """The comment with which a study begins, as one line."""
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def counts(text: str, word: str) -> list[int]:
    """What stands before a word: ``11 cells`` -> 11."""
    return [int(n.replace(",", "")) for n in re.findall(rf"([\d,]+) {word}", text)]


@dataclass(frozen=True)
class Looked:
    """A cell, its configuration under the first seed, and the hashes of its stages there."""

    cell: Cell
    loaded: Loaded
    stages: frozenset[str]


@lru_cache
def looked(*files: str) -> tuple[Looked, ...]:
    """Every cell of a study. Loading takes a while, and seeds change nothing but themselves."""
    runs = {run.cell.name: run for run in reversed(runs_of(load_study(files), Path("study")))}
    found = []
    for run in reversed(runs.values()):
        loaded = run.load()
        found.append(Looked(run.cell, loaded, frozenset(s.identity for s in resolve(loaded))))
    return tuple(found)


def stages_of(cells: Sequence[Looked]) -> int:
    """How many stages a study trains: under each seed those that differ."""
    seeds = {seed for one in cells for seed in one.cell.seeds}
    return sum(len({s for one in cells if seed in one.cell.seeds for s in one.stages}) for seed in seeds)


def cells_of(name: str) -> dict[str, Cell]:
    return {cell.name: cell for cell in grid(load_study([f"studies/{name}.yaml"]))}


def test_the_studies_are_there() -> None:
    assert NAMES == ["default", "jarvis", "l2t", "larger", "real", "ross_targets", "tuning", "vift"]


@pytest.mark.parametrize("name", NAMES)
def test_a_head_tells_what_the_study_is(name: str) -> None:
    told, cells = head(name), looked(f"studies/{name}.yaml")
    for word in ("Question:", "Endpoint (fixed before the first run):", "Seeds:"):
        assert word in told
    if name == "default":  # tells its hours
        return
    assert "Tries:" in told and ("ot run yet" in told or name in ("larger", "ross_targets", "tuning"))
    cost = told.partition("Cost:")[2]
    assert counts(cost, "cells")[0] == len(cells)
    assert counts(cost, "runs")[0] == sum(len(one.cell.seeds) for one in cells)
    assert counts(cost, "stages")[0] == stages_of(cells)


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_a_run_that_would_start(name: str) -> None:
    config, cells = load_study([f"studies/{name}.yaml"]), looked(f"studies/{name}.yaml")
    methods = {"ross", "l2t", "jarvis", "vift"}  # whether the study switches them or not
    for one in cells:
        on = {m for m, given in one.loaded.run.algorithms.items() if given.get("enabled", True)}
        assert on & methods == set(one.cell.methods)
        refuse_mistakes(one.loaded, here=False)
    first: dict[str, Run] = {}
    for run in runs_of(config, Path("study")):
        before = first.setdefault(run.cell.name, run)
        ours = [f"seed={run.seed}", f"run_name={run.cell.name}-{run.seed}"]
        theirs = [f"seed={before.seed}", f"run_name={run.cell.name}-{before.seed}"]
        assert run.arguments == [ours[theirs.index(a)] if a in theirs else a for a in before.arguments]


@pytest.mark.parametrize("name", ["default", "tuning", "vift"])
def test_vift_is_never_given_questions_about_pictures(name: str) -> None:
    cells = [one for one in looked(f"studies/{name}.yaml") if "vift" in one.cell.methods]
    assert cells
    for one in cells:
        stage = next(s for s in resolve(one.loaded) if s.name == "instruct")
        dataset = to_plain(stage.config.train_loader.dataset)
        weights = dataset["mixture"]["weights"]
        kinds = {k: s["kind"] for k, s in dataset["streams"].items()}
        assert {"caption", "text"} == {kinds[k] for k, weight in weights.items() if weight}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_measured_is_asked(name: str) -> None:
    config = load_study([f"studies/{name}.yaml"])
    asked = suites_of(config.evaluation).suites
    assert config.primary is not None
    assert {e.suite for e in (config.primary, *config.secondary)} <= set(asked)
    for evaluation in {cell.evaluation for cell in grid(config)}:
        given = suites_of(evaluation)
        assert set(given.suites) == set(asked)


@pytest.mark.parametrize(
    "name", [n if n == "real" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_plan_needs_neither_data_nor_parts_nor_packages(name: str, tmp_path: Path) -> None:
    said, cells = io.StringIO(), looked(f"studies/{name}.yaml")
    console = Console(file=said, width=200)
    config = load_study([f"studies/{name}.yaml"])
    assert run_study(config, Path("study"), jobs=2, plan_only=True, console=console) == 0
    runs = sum(len(one.cell.seeds) for one in cells)
    assert f"{runs} runs to do, 2 at a time; {stages_of(cells)} stages to train" in said.getvalue()
    assert all(re.search(rf"^ *{re.escape(one.cell.name)} ", said.getvalue(), re.M) for one in cells)
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_placebo_is_its_cell_with_one_thing_changed(name: str) -> None:
    cells = cells_of(name)
    for cell in cells.values():
        if cell.placebo_of is None:
            continue
        real = cells[cell.placebo_of]
        assert cell.role == "placebo" and real.methods and set(cell.seeds) <= set(real.seeds)
        if set(cell.methods) == set(real.methods):
            assert len(set(cell.arguments) - set(real.arguments)) == 1 and cell.files == real.files


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_is_held_against_one_that_has_its_seeds(name: str) -> None:
    cells = cells_of(name)
    for cell in cells.values():
        assert set(cell.seeds) <= set(cells[cell.matched_to or "baseline"].seeds)


def test_each_method_has_as_many_tries_on_seeds_and_questions_of_their_own() -> None:
    config = load_study(["studies/tuning.yaml"])
    cells = {cell.name: cell for cell in grid(config)}
    for method in ("ross", "l2t", "jarvis", "vift"):
        tried = [cell for cell in cells.values() if cell.methods == (method,)]
        assert method in {cell.name for cell in tried}  # its card's settings
        assert {cell.tries for cell in tried} == {len(tried)} == {4}
        assert len({cell.arguments for cell in tried}) == 4  # each another one
    studies = [n for n in NAMES if n not in ("tuning", "real")]  # `real` has another base and other questions
    assert not {s for cell in cells.values() for s in cell.seeds} & {
        s for name in studies for cell in cells_of(name).values() for s in cell.seeds
    }
    assert config.evaluation == ["studies/scenes-questions.yaml", "studies/scenes-questions-dev.yaml"]
    asked, ours = (
        {
            suite: given["seed"]
            for suite, given in yaml.safe_load((FOLDER / file).read_text())["suites"].items()
        }
        for file in ("scenes-questions.yaml", "scenes-questions-dev.yaml")
    )
    assert ours.keys() == asked.keys() and not set(ours.values()) & set(asked.values())
    for name in studies:  # nobody else asks these
        assert "studies/scenes-questions-dev.yaml" not in load_study([f"studies/{name}.yaml"]).evaluation


RESULTS = FOLDER.parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("default_study", set()),
        ("tuning_study", set()),
        ("larger_study", {"l2t"}),
        ("ross_targets_study", set()),
    ],
)
def test_a_published_study_is_its_yaml(name: str, missing: set[str]) -> None:
    cells = grid(load_study([str(RESULTS / name / "study.yaml")]))
    rows = json.loads((RESULTS / name / "study.json").read_text())["cells"]
    assert {(cell.name, seed, cell.tries) for cell in cells for seed in cell.seeds} == {
        (row["name"], row["seed"], row["tries"]) for row in rows
    }
    assert {row["name"] for row in rows if row["status"] != "done"} == missing


def test_auto_encoders_go_with_the_targets_of_ross() -> None:
    config, cost = load_study(KL_VQ), head("ross_targets").partition("Cost:")[2]
    cells = grid(config)
    alone = cells_of("ross_targets")
    added = [c for c in cells if c.name not in alone]
    assert {c.name for c in added} == {"kl", "vq", "kl_shuffled", "vq_shuffled"}
    runs = sum(len(c.seeds) for c in cells)
    more = sum(len(c.seeds) for c in added)
    assert counts(cost, "cells")[1] == len(cells) and counts(cost, "runs")[1] == runs
    assert counts(cost, "stages")[1] == counts(cost, "stages")[0] + 2 * more  # each run has its own two
    extra = head("ross_targets_kl_vq").partition("Cost:")[2]
    assert counts(extra, "cells") == [len(added)] and counts(extra, "runs") == [more]
    for run in runs_of(config, Path("study"))[: len(cells)]:
        if run.cell in added:
            loaded = run.load()
            refuse_mistakes(loaded, here=False)
            assert (
                str(config.parts[run.cell.name[:2]]["kind"])
                in loaded.run.algorithms["ross"]["target"]["path"]
            )


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("algorithms.ross.shufle_targets=true", r"shufle_targets: unknown key; did you mean 'shuffle_targets'"),
        ("stages.instruct.max_durration=3ba", r"cell x: .*max_durration: unknown key; did you mean 'max_duration'"),
    ],
)  # fmt: skip
def test_a_misspelt_key_of_a_cell_is_named(key: str, message: str, tmp_path: Path) -> None:
    body = {**yaml.safe_load((FOLDER / "ross_targets.yaml").read_text())}
    body["cells"]["x"] = {"methods": ["ross"], "set": [key]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(body))
    config = load_study([str(tmp_path / "study.yaml")])
    run = next(r for r in runs_of(config, Path("study")) if r.cell.name == "x")
    with pytest.raises(UserError, match=message) as refused:
        refuse_mistakes(run.load(), here=False)
    assert "\n" not in str(refused.value)
    # And told before parts are trained for minutes.
    with pytest.raises(UserError, match=message):
        run_study(config, Path("study"), jobs=1, plan_only=False, console=Console(file=io.StringIO()))
    assert not (tmp_path / "cache" / "parts").exists()
