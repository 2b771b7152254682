"""The runs of a study: a cell with a seed, what it is made of, and whether it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...algorithms.compose import identical_by_construction
from ...models.errors import UserError
from ..builders import algorithms_of_stage
from ..config import Loaded, load
from ..run_folder import write_atomically
from ..stages import Stage, resolve
from .spec import Cell, StudyConfig, grid

RUNS, CELLS, RECORD = "runs", "cells", "cell.json"


@dataclass(frozen=True)
class Run:
    """One training and its evaluation.

    Attributes:
        cell, seed: what it is.
        root: folder of the study.
        evaluation: YAMLs and ``key=value`` of ``opsin eval``.
    """

    cell: Cell
    seed: int
    root: Path
    evaluation: tuple[str, ...]

    @property
    def name(self) -> str:
        """``ross+l2t-17``."""
        return f"{self.cell.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where its predictions and scores go."""
        return self.root / CELLS / self.name

    @property
    def arguments(self) -> list[str]:
        """``key=value`` of its training."""
        own = [f"seed={self.seed}", f"run_name={self.name}", f"run_root={self.root / RUNS}"]
        quiet = [
            "progress_bar=false",
            "reuse_last_stage=true",  # cells that differ in how they are asked
            "callbacks.speed_monitor.window_size=10",
        ]  # which tells what a step costs
        return [*self.cell.arguments, *own, *quiet]

    def load(self) -> Loaded:
        """Its configuration.

        Raises:
            UserError: names the cell beside what is wrong.
        """
        try:
            return load(self.cell.files, self.arguments)
        except UserError as error:
            raise UserError(f"cell {self.cell.name}: {error}") from error

    def record(self) -> dict[str, Any] | None:
        """What was written when it was done; None: not yet."""
        path = self.folder / RECORD
        return json.loads(path.read_text()) if path.is_file() else None


def runs_of(config: StudyConfig, root: Path) -> list[Run]:
    """All runs, seed by seed, so that a study that is stopped early has whole seeds."""
    cells = grid(config)
    order = [(seed, cell) for seed in config.seeds for cell in cells if seed in cell.seeds]
    return [Run(cell, seed, root, cell.evaluation) for seed, cell in order]


def identity(stages: Sequence[Stage], evaluation: str) -> str:
    """Hash of what a run learns from and is asked: a result under another one is not its result."""
    body = json.dumps([[s.identity for s in stages], evaluation])
    return hashlib.blake2b(body.encode(), digest_size=10).hexdigest()


def same_as(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Cells that equal another one by construction, whatever the data is: name -> (the other cell, why)."""
    ordinary = [r.cell for r in runs if r.cell.role in ("baseline", "factorial", "single")]
    cells = list({c.name: c for c in ordinary}.values())
    found = {}
    for cell in cells:
        run = next(r for r in runs if r.cell is cell)
        loaded = run.load()
        acting: set[str] = set()
        idle: dict[str, str] = {}
        for stage in resolve(loaded):
            built = algorithms_of_stage(loaded, stage.name, stage.config)
            equal = identical_by_construction(built)
            resting = {} if equal is None else dict(equal.idle)
            idle.update(resting)
            acting |= {m for m in built if m not in resting}
        idle = {m: why for m, why in idle.items() if m not in acting}
        if not idle:
            continue
        own = _apart_from_toggles(cell, idle)
        other = next((c for c in cells if c is not cell and own == _apart_from_toggles(c, idle)), None)
        if other is not None:
            found[cell.name] = (other.name, "; ".join(idle.values()))
    return found


def _apart_from_toggles(cell: Cell, idle: Mapping[str, str]) -> tuple[Any, ...]:
    """What a cell is, whether or not idle methods are switched on in it."""
    toggles = {f"algorithms.{m}={value}" for m in idle for value in ("true", "false")}
    methods = tuple(m for m in cell.methods if m not in idle)
    return methods, cell.files, [a for a in cell.arguments if a not in toggles], cell.evaluation


def write_study(
    root: Path,
    config: StudyConfig,
    runs: Sequence[Run],
    told: dict[str, dict[str, Any]],
    check: dict[str, Any] | None = None,
) -> None:
    """Write ``study.json``, which reports read: every run with what became of it, and the check before them."""
    entries = []
    for run in runs:
        cell = run.cell
        entry: dict[str, Any] = {
            "name": cell.name, "methods": list(cell.methods), "role": cell.role, "placebo_of": cell.placebo_of,
            "matched_to": cell.matched_to, "seed": run.seed, "folder": f"{CELLS}/{run.name}", "tries": cell.tries,
            "status": "missing",
        }  # fmt: skip
        entries.append({**entry, **told.get(run.name, {})})
    body = {
        "name": config.name,
        "question": config.question,
        "seeds": config.seeds,
        "baseline": "baseline",
        "primary": None if config.primary is None else vars(config.primary),
        "secondary": [vars(e) for e in config.secondary],
        "factors": config.factorial,
        "check": check,
        "cells": entries,
    }
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / "study.json", json.dumps(body, indent=1) + "\n")
