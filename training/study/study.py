"""``opsin ablate`` and ``opsin study``: plan the grid, say what it costs, train what is missing, report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ...evaluation.study.pictures import keep_suites
from ...models.errors import UserError, nearest
from ..check import refuse_mistakes
from ..eval_config import suites_of
from ..prepare import prepare
from ..run_folder import refuse_unwritable
from ..stages import resolve
from .audit import CheckFailed, audit, for_study, refuse_unasked, verdict_of
from .executor import Planned
from .lines import failed
from .parts import make_parts, missing_parts
from .reach import reach
from .runs import Run, identity, runs_of, same_as
from .spec import StudyConfig
from .trial import measure
from .work import Work

SMALLEST_WITHOUT_QUESTIONS = "evaluation: gives no YAML of `opsin eval`: there would be nothing to compare"


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    jobs: int | None,
    plan_only: bool,
    console: Console,
    trial: bool = False,
    check: bool = True,
) -> int:
    """Train and evaluate all cells that are not done, write ``study.json``, ``ablation.json`` and ``report.html``.

    Args:
        config: a checked study.
        out: its folder; what is there already and fits is kept.
        jobs: runs at a time; None: one a GPU, else one a core.
        plan_only: only say what would be done.
        console: for the plan, progress and the verdicts.
        trial: train a few steps of every cell first, and say how long all of it will take.
        check: make the study's ``check:`` first; else its report says that it was left out.

    Returns:
        How many runs failed.

    Raises:
        UserError: anything wrong in any cell, before the first one is trained.
        CheckFailed: a line of the check does not hold; no cell was trained that the check does not need itself.
    """
    work = begin(config, out, jobs=jobs, console=console, here=not plan_only, made=trial or not plan_only)
    missing = work.missing()
    show_plan(work, missing)
    if trial and missing:
        measure(missing, work.jobs, console)
    if plan_only:
        return 0
    if config.check is not None:
        lines = audit(work, config.check, keep_pictures) if check else None
        work.check = for_study(work, config.check, lines)
        work.write()
        if lines is not None and failed(lines):
            raise CheckFailed(verdict_of(lines))
    work.train(work.missing())
    keep_pictures(work)
    report(out, console)
    return work.failed


def check_study(config: StudyConfig, out: Path, *, jobs: int | None, console: Console) -> None:
    """Only make the study's ``check:``, training the runs that it needs, which the study uses again.

    Raises:
        UserError: the study has none, or anything is wrong in any cell.
        CheckFailed: a line does not hold.
    """
    if config.check is None:
        raise UserError("study: check: is not given; name the lines that are to hold")
    work = begin(config, out, jobs=jobs, console=console, here=True, made=True)
    lines = audit(work, config.check, keep_pictures)
    work.check = for_study(work, config.check, lines)
    work.write()
    if failed(lines):
        raise CheckFailed(verdict_of(lines))
    console.print(f"check: passed, lines asked: {len(lines)}")


def begin(
    config: StudyConfig, out: Path, *, jobs: int | None, console: Console, here: bool, made: bool
) -> Work:
    """Refuse what is wrong in any cell, make the data, and look at what is done.

    Args:
        config: a checked study.
        out: its folder.
        jobs: runs at a time; None: one a GPU, else one a core.
        console: for progress.
        here: it is to be trained on this machine.
        made: make the data that is not there.

    Raises:
        UserError: see :func:`run_study`.
    """
    if not config.evaluation:
        raise UserError(f"study: {SMALLEST_WITHOUT_QUESTIONS}")
    refuse_unwritable(out, f"--out {out}")
    refuse_endpoints(config, out)
    runs = runs_of(config, out.resolve())
    asked = {given: question_key(given) for given in {r.cell.evaluation for r in runs}}
    equal = same_as(runs)
    # One run of each cell: its seed changes nothing of what can be wrong.
    cells = runs[: len({r.cell.name for r in runs})]
    waiting = missing_parts(config.parts)
    _refuse(cells, here and not waiting)  # what is mistyped is told before parts are trained for minutes
    if waiting and made:
        make_parts(config.parts, console)
        _refuse(cells, here)
        waiting = []
    if waiting:
        console.print(
            f"parts to train first: {', '.join(waiting)}; cells are looked at again when they are there"
        )
    trained = [r for r in runs if r.cell.name not in equal]
    if made:
        for loaded in {str(r.load().run.prepare): r.load() for r in trained}.values():
            prepare(loaded, console)
    plans = [planned(run, asked[run.evaluation]) for run in trained]
    count = jobs or torch.cuda.device_count() or (os.cpu_count() or 1)
    work = Work(config, out, runs, equal, plans, count, console)
    if config.check is not None and not waiting:
        refuse_unasked(work, config.check)
    return work


def _refuse(cells: Sequence[Run], here: bool) -> None:
    for run in cells:
        refuse_mistakes(run.load(), here=here)


def refuse_endpoints(config: StudyConfig, out: Path) -> None:
    """Refuse an endpoint that nothing asks, and another primary one than runs were made under.

    Raises:
        UserError: names the nearest suite, or what was fixed.
    """
    suites = suites_of(config.evaluation).suites
    for key, one in (("primary", config.primary), *(("secondary", e) for e in config.secondary)):
        if one is not None and one.suite not in suites:
            raise UserError(
                f"study: {key}: the evaluation has no suite '{one.suite}'{nearest(one.suite, suites)}"
            )
    try:
        before = json.loads((out / "study.json").read_text(encoding="utf-8"))
        begun = any(cell["status"] == "done" for cell in before["cells"])
        fixed = before["primary"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if begun and fixed != (None if config.primary is None else vars(config.primary)):
        told = "none" if fixed is None else f"{fixed.get('suite')}/{fixed.get('measure')}"
        raise UserError(
            f"study: primary: {out / 'study.json'} has runs that were made when it was fixed as {told}; "
            "choose another --out, or ask the same"
        )


def keep_pictures(work: Work) -> None:
    """Keep the pictures of what is asked beside the study: they tell which questions hang together."""
    limits = [suites_of(given).config.limit for given in {r.cell.evaluation for r in work.runs}]
    most = None if None in limits else max(n for n in limits if n is not None)
    keep_suites(work.out, suites_of(work.config.evaluation).suites, most)


def question_key(files: Sequence[str]) -> str:
    """What is asked, as one text: results of other questions are other results."""
    from ..config import to_plain

    wanted = suites_of(files)
    return str(sorted(to_plain(wanted.config).items()))


def planned(run: Run, asked: str) -> Planned:
    """A run with its stages, once its data is there."""
    loaded = run.load()
    stages = resolve(loaded)
    return Planned(run, stages, identity(stages, asked), loaded.run.reuse_stages)


def show_plan(work: Work, missing: Sequence[Planned]) -> None:
    """Print the grid: cells, seeds, stages that are shared, what is left to do."""
    config, equal, console = work.config, work.equal, work.console
    table = Table(
        title=f"{config.name}: {config.question}".rstrip(": "), title_justify="left", show_edge=False
    )
    for column in ("cell", "role", "methods", "seeds", "to do"):
        table.add_column(column)
    waiting = [p.run.cell.name for p in missing]
    for cell in work.cells.values():
        todo = str(waiting.count(cell.name)) if cell.name not in equal else f"is {equal[cell.name][0]}"
        table.add_row(
            cell.name, cell.role, "+".join(cell.methods) or "-", " ".join(map(str, cell.seeds)), todo
        )
    console.print(table)
    for name, (_, why) in equal.items():
        console.print(f"{name}: identical by construction, not trained: {why}", soft_wrap=True)
    stages = {(s.identity, "" if p.shares else p.run.name) for p in missing for s in p.stages}
    used = sum(len(p.stages) for p in missing)
    console.print(
        f"{len(missing)} runs to do, {work.jobs} at a time; {len(stages)} stages to train ({used - len(stages)} are shared)"
    )
    console.print(reach(work), soft_wrap=True, highlight=False)


def report(out: Path, console: Console) -> None:
    """Analyse what is there and write the page."""
    from ...evaluation.study import write_study_report

    page = write_study_report(out)
    console.print(f"report: {page}", soft_wrap=True)
