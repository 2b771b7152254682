"""``opsin ablate`` and ``opsin study``: plan the grid, say what it costs, train what is missing, report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ...evaluation.study.pictures import keep_suites
from ...models.errors import UserError
from ..check import refuse_mistakes
from ..eval_config import load_suites
from ..prepare import prepare
from ..run_folder import refuse_unwritable
from ..stages import resolve
from .executor import Planned, done, execute
from .runs import Run, identity, runs_of, same_as, write_study
from .spec import StudyConfig
from .trial import measure

SMALLEST_WITHOUT_QUESTIONS = "evaluation: gives no YAML of `opsin eval`: there would be nothing to compare"


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    jobs: int | None,
    plan_only: bool,
    console: Console,
    trial: bool = False,
) -> int:
    """Train and evaluate all cells that are not done, write ``study.json``, ``ablation.json`` and ``report.html``.

    Args:
        config: a checked study.
        out: its folder; what is there already and fits is kept.
        jobs: runs at a time; None: one a GPU, else one a core.
        plan_only: only say what would be done.
        console: for the plan, progress and the verdicts.
        trial: train a few steps of every cell first, and say how long all of it will take.

    Returns:
        How many runs failed.

    Raises:
        UserError: anything wrong in any cell, before the first one is trained.
    """
    if not config.evaluation:
        raise UserError(f"study: {SMALLEST_WITHOUT_QUESTIONS}")
    refuse_unwritable(out, f"--out {out}")
    runs = runs_of(config, out.resolve())
    asked = question_key(config.evaluation)
    equal = same_as(runs)
    for run in runs[
        : len({r.cell.name for r in runs})
    ]:  # every cell once: its seed changes nothing of what can be wrong
        refuse_mistakes(run.load(), here=not plan_only)
    trained = [r for r in runs if r.cell.name not in equal]
    if trial or not plan_only:
        for loaded in {str(r.load().run.prepare): r.load() for r in trained}.values():
            prepare(loaded, console)
    plans = [planned(run, asked) for run in trained]
    records = {p.run.name: done(p) for p in plans}
    missing = [p for p in plans if records[p.run.name] is None]
    count = jobs or torch.cuda.device_count() or (os.cpu_count() or 1)
    show_plan(config, runs, equal, missing, count, console)
    if trial and missing:
        measure(missing, count, console)
    if plan_only:
        return 0
    told: dict[str, dict[str, Any]] = {
        r.name: {"status": "identical", "identical_to": equal[r.cell.name][0], "why": equal[r.cell.name][1]}
        for r in runs
        if r.cell.name in equal
    }
    told.update({name: known(record) for name, record in records.items() if record is not None})
    write_study(out, config, runs, told)
    left = len(missing)

    def tell(run: Run, answer: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        told[run.name] = known(answer)
        write_study(out, config, runs, told)
        console.print(
            f"{run.name}: {answer['status']} {answer.get('why', '')} ({left} to go)",
            soft_wrap=True,
            highlight=False,
        )

    if missing:
        execute(missing, count, tell, environments(count))
    wanted = load_suites(config.evaluation)
    keep_suites(out, wanted.suites, wanted.config.limit)
    report(out, console)
    return sum(entry["status"] == "failed" for entry in told.values())


def question_key(files: Sequence[str]) -> str:
    """What is asked, as one text: results of other questions are other results."""
    from ..config import to_plain

    wanted = load_suites(files)
    return str(sorted(to_plain(wanted.config).items()))


def planned(run: Run, asked: str) -> Planned:
    """A run with its stages, once its data is there."""
    stages = resolve(run.load())
    return Planned(run, stages, identity(stages, asked))


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


def show_plan(
    config: StudyConfig, runs: Sequence[Run], equal: dict[str, tuple[str, str]], missing: Sequence[Planned], jobs: int,
    console: Console,
) -> None:  # fmt: skip
    """Print the grid: cells, seeds, stages that are shared, what is left to do."""
    table = Table(
        title=f"{config.name}: {config.question}".rstrip(": "), title_justify="left", show_edge=False
    )
    for column in ("cell", "role", "methods", "seeds", "to do"):
        table.add_column(column)
    waiting = [p.run.cell.name for p in missing]
    for cell in {r.cell.name: r.cell for r in runs}.values():
        todo = str(waiting.count(cell.name)) if cell.name not in equal else f"is {equal[cell.name][0]}"
        table.add_row(
            cell.name, cell.role, "+".join(cell.methods) or "-", " ".join(map(str, cell.seeds)), todo
        )
    console.print(table)
    for name, (_, why) in equal.items():
        console.print(f"{name}: identical by construction, not trained: {why}", soft_wrap=True)
    stages = {s.identity: s for p in missing for s in p.stages}
    used = sum(len(p.stages) for p in missing)
    console.print(
        f"{len(missing)} runs to do, {jobs} at a time; {len(stages)} stages to train ({used - len(stages)} are shared)"
    )


def report(out: Path, console: Console) -> None:
    """Analyse what is there and write the page."""
    from ...evaluation.study import write_study_report

    page = write_study_report(out)
    console.print(f"report: {page}", soft_wrap=True)
