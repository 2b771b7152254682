"""What a study will cost, measured on this machine: a few steps of every cell, a few questions."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer.core import Time, TimeUnit
from rich.console import Console
from rich.table import Table

from ...models.errors import UserError
from ..config import Loaded, load
from ..eval_config import split_given, suites_of
from ..evaluate import evaluate_model, read_items
from ..schema import StageConfig
from ..stage_data import build_dataset
from ..train import train
from .executor import Planned, finished, made_by

SHORT, LONG, ASKED = 3, 13, 64
"""Steps of the two trainings from which start and step are told apart; questions of each suite."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a stage: what it takes to begin and end, and a step."""

    fixed: float
    step: float

    def of(self, steps: int) -> float:
        """Seconds of so many steps."""
        return self.fixed + self.step * steps


def steps_of(config: StageConfig, seed: int) -> int:
    """Optimizer steps of a stage.

    Raises:
        UserError: its duration is in a unit that says nothing about steps.
    """
    duration = Time.from_input(config.max_duration)
    if duration.unit == TimeUnit.BATCH:
        return int(duration.value)
    if duration.unit == TimeUnit.SAMPLE:
        return math.ceil(int(duration.value) / config.global_train_batch_size)
    if duration.unit == TimeUnit.EPOCH:
        dataset = build_dataset(
            config.train_loader.dataset,
            config.global_train_batch_size,
            seed,
            whole=False,
            duration=config.max_duration,
        )
        return int(duration.value) * max(1, dataset.samples_a_rank // config.global_train_batch_size)
    raise UserError(f"--trial: max_duration {config.max_duration}: use ba, sp or ep")


def measure(plans: Sequence[Planned], jobs: int, console: Console) -> float:
    """Train every cell for a few steps, ask the first model a few questions, print what all runs will take.

    Args:
        plans: runs to do; one of each cell is tried.
        jobs: runs at a time. The trial has the machine for itself: with more runs than cores expect more.
        console: for the table.

    Returns:
        Seconds of the study.
    """
    costs: dict[tuple[str, str], Cost] = {}
    asking: float | None = None
    first = {p.run.cell.name: p for p in reversed(plans)}
    with tempfile.TemporaryDirectory(prefix="opsin-trial-") as folder:
        for planned in first.values():
            seconds = {}
            for steps in (SHORT, LONG):
                loaded = _short(planned, folder, steps)
                run = train(loaded, Console(quiet=True))
                for stage in planned.stages:
                    done = json.loads((run.path / "stages" / stage.name / "done.json").read_text())
                    seconds[stage.name, steps] = float(done["seconds"])
                if asking is None and planned.run.evaluation:
                    asking = _asking(str(run.path), planned.run.evaluation, Path(folder) / "asked")
            for stage in planned.stages:
                short, long = (seconds[stage.name, n] for n in (SHORT, LONG))
                step = max(0.0, long - short) / (LONG - SHORT)
                costs[planned.run.cell.name, stage.name] = Cost(max(0.0, short - SHORT * step), step)
    return _show(plans, costs, asking or 0.0, jobs, console)


def _short(planned: Planned, folder: str, steps: int) -> Loaded:
    run = planned.run
    over = [
        f"run_root={folder}",
        f"run_name={run.name}-{steps}",
        f"max_duration={steps}ba",
        "save_interval=1000000ba",
    ]
    return load(run.cell.files, [*run.arguments, *over, "evaluation=null", "reuse_stages=false"])


def _asking(model: str, files: Sequence[str], out: Path) -> float:
    """Seconds that all questions of an evaluation take, from a few of each suite."""
    wanted = suites_of(files)
    items = {name: len(of) for name, of in read_items(wanted).items()}
    least = min(ASKED, wanted.config.limit or ASKED)
    began = time.monotonic()
    yamls, arguments = split_given(files)
    evaluate_model(model, yamls, [*arguments, f"limit={least}"], out, Console(quiet=True))
    asked = sum(min(least, n) for n in items.values())
    return (time.monotonic() - began) * sum(items.values()) / max(1, asked)


def _show(
    plans: Sequence[Planned], costs: dict[tuple[str, str], Cost], asking: float, jobs: int, console: Console
) -> float:
    table = Table(title="cost", title_justify="left", show_edge=False)
    for column in ("cell", "stage", "steps", "seconds a step", "seconds"):
        table.add_column(column, justify="left" if column in ("cell", "stage") else "right")
    total, shown = 0.0, set()
    seen = {s.identity for p in plans for s in p.stages if finished(p.run, s)}
    for planned in plans:
        cell = planned.run.cell.name
        for stage in planned.stages:
            steps, cost = steps_of(stage.config, planned.run.seed), costs[cell, stage.name]
            # Cells of a study share whatever stage is equal, the last one too.
            there = stage.identity in seen if planned.shares else made_by(planned.run, stage)
            if not there:
                total += cost.of(steps)
            seen.add(stage.identity)
            if (cell, stage.name) not in shown:
                table.add_row(cell, stage.name, f"{steps:,}", f"{cost.step:.3f}", f"{cost.of(steps):,.0f}")
                shown.add((cell, stage.name))
        total += asking
    console.print(table)
    wall = total / min(jobs, max(1, len(plans)))
    console.print(
        f"asking: {asking:,.0f} s a run; all {len(plans)} runs: {total / 60:,.0f} minutes of work, "
        f"{wall / 60:,.0f} minutes with {jobs} at a time"
    )
    return wall
