"""A study on this machine: its runs, what became of each, and the training of those that are missing."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .executor import Planned, done, execute
from .runs import Run, write_study
from .spec import Cell, StudyConfig


@dataclass
class Work:
    """What is planned, what is done, and what ``study.json`` says of it.

    Attributes:
        config: of the study.
        out: its folder.
        runs: of all cells, seed by seed.
        equal: cells that repeat another one by construction: name -> (the other cell, why).
        plans: runs that are trained (those of all other cells).
        jobs: runs at a time.
        console: for progress.
        check: what ``study.json`` says of the check before the runs; None: none is asked.
        told: name of a run -> what became of it.
    """

    config: StudyConfig
    out: Path
    runs: list[Run]
    equal: dict[str, tuple[str, str]]
    plans: list[Planned]
    jobs: int
    console: Console
    check: dict[str, Any] | None = None
    told: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look at what is done already.

        Raises:
            UserError: a folder holds the result of other settings.
        """
        for run in self.runs:
            if run.cell.name in self.equal:
                other, why = self.equal[run.cell.name]
                self.told[run.name] = {"status": "identical", "identical_to": other, "why": why}
        for plan in self.plans:
            record = done(plan)
            if record is not None:
                self.told[plan.run.name] = known(record)

    @property
    def cells(self) -> dict[str, Cell]:
        """By name."""
        return {run.cell.name: run.cell for run in self.runs}

    def run_of(self, cell: str) -> Run:
        """The first run of a cell: seeds change nothing of what it is made of."""
        return next(run for run in self.runs if run.cell.name == cell)

    def missing(self, names: Collection[str] | None = None) -> list[Planned]:
        """Runs that are still to do (a failed one is tried again), of all or of those named."""
        return [
            plan
            for plan in self.plans
            if self.told.get(plan.run.name, {}).get("status") != "done"
            and (names is None or plan.run.name in names)
        ]

    @property
    def failed(self) -> int:
        """How many runs failed."""
        return sum(entry["status"] == "failed" for entry in self.told.values())

    def write(self) -> None:
        """Write ``study.json``."""
        write_study(self.out, self.config, self.runs, self.told, self.check)

    def train(self, plans: Sequence[Planned]) -> None:
        """Train and evaluate some runs; each is told as it ends."""
        left = len(plans)

        def tell(run: Run, answer: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            self.told[run.name] = known(answer)
            self.write()
            self.console.print(
                f"{run.name}: {answer['status']} {answer.get('why', '')} ({left} to go)",
                soft_wrap=True,
                highlight=False,
            )

        self.write()
        if plans:
            execute(plans, self.jobs, tell, environments(self.jobs))


def known(record: dict[str, Any]) -> dict[str, Any]:
    """What ``study.json`` says of a run that ended."""
    return {k: v for k, v in record.items() if k in ("status", "why", "cost")}


def environments(jobs: int) -> list[dict[str, str]]:
    """Of the worker processes: a GPU each, or a share of the cores."""
    common = {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"), "TOKENIZERS_PARALLELISM": "false"}
    gpus = torch.cuda.device_count()
    if gpus:
        shown = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
        return [{**common, "CUDA_VISIBLE_DEVICES": shown[i % gpus]} for i in range(jobs)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return [{**common, "OMP_NUM_THREADS": str(threads)}]
