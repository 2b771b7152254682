"""``opsin ablate`` and ``opsin study run|check``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...models.errors import UserError, nearest
from .spec import EndpointConfig, StudyConfig, load_study, of_toggles

FAILED = 1
"""Exit code when some runs failed (the report says which), or a line of the check does not hold."""
WIDE = 160
"""Columns of what is written into a file or a pipe: a table must not be folded there."""

study_app = typer.Typer(no_args_is_help=True, help="Studies: many runs, one question, one honest table.")

Jobs = Annotated[int | None, typer.Option(min=1, help="Runs at a time. Default: one a GPU, else one a core.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Say what would be trained, and stop.")]
Trial = Annotated[
    bool,
    typer.Option("--trial", help="Measure a few steps of every cell first, and say how long all will take."),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the study. Default: studies/NAME.")]


def ablate(
    config: Annotated[
        list[str],
        typer.Argument(help="YAMLs of a run, merged left to right; key=value; more methods to toggle."),
    ],
    toggle: Annotated[
        list[str], typer.Option(help="Methods to switch on and off: --toggle l2t ross jarvis.")
    ],
    evaluation: Annotated[
        list[str] | None, typer.Option(help="YAML of `opsin eval`; may be given again.")
    ] = None,
    subsets: Annotated[str, typer.Option(help="singles, pairs (and singles), or all.")] = "singles",
    seeds: Annotated[int, typer.Option(min=1, help="How many: 17, 18, ...")] = 3,
    overlay: Annotated[
        list[str] | None, typer.Option(help="NAME=YAML: a further cell; may be given again.")
    ] = None,
    primary: Annotated[
        str | None, typer.Option(help="SUITE/MEASURE: the endpoint, fixed before the runs.")
    ] = None,
    out: Out = None,
    jobs: Jobs = None,
    plan: PlanOnly = False,
    trial: Trial = False,
    report: Annotated[
        bool, typer.Option("--report", help="Only write the report of what is there, anew.")
    ] = False,
) -> None:
    """Train a base with and without methods, same seeds, data and start; say what helped, and how sure that is."""
    from ..registry import METHODS
    from ..registry import algorithms as registry

    files = [c for c in config if "=" not in c and (Path(c).is_file() or c not in registry.names())]
    arguments = [c for c in config if "=" in c]
    methods = [m for given in toggle for m in given.split(",")] + [
        c for c in config if c not in files and c not in arguments
    ]
    for method in methods:
        if method not in registry.names():
            raise UserError(f"--toggle {method}: unknown method{nearest(method, METHODS)}")
    overlays: dict[str, list[str]] = {}
    for given in overlay or []:
        name, separator, file = given.partition("=")
        if not separator or not name or not file:
            raise UserError(f"--overlay '{given}': use NAME=YAML")
        overlays.setdefault(name, []).append(file)
    wanted = of_toggles(
        files,
        arguments,
        methods,
        subsets=subsets,
        seeds=range(17, 17 + seeds),
        overlays=overlays,
        evaluation=evaluation or [],
        primary=_endpoint(primary),
    )
    _run(wanted, out, jobs, plan, report, trial)


@study_app.command("run")
def run_(
    study: Annotated[list[str], typer.Argument(help="YAML of a study, then key=value.")],
    out: Out = None,
    jobs: Jobs = None,
    plan: PlanOnly = False,
    trial: Trial = False,
    report: Annotated[
        bool, typer.Option("--report", help="Only write the report of what is there, anew.")
    ] = False,
    without_check: Annotated[
        bool, typer.Option("--without-check", help="Leave out the study's check; the report says so.")
    ] = False,
) -> None:
    """Train what a study misses and report; stopped at any time, the same command goes on."""
    wanted = load_study([s for s in study if "=" not in s], [s for s in study if "=" in s])
    _run(wanted, out, jobs, plan, report, trial, check=not without_check)


@study_app.command("check")
def check_(
    study: Annotated[list[str], typer.Argument(help="YAML of a study, then key=value.")],
    out: Out = None,
    jobs: Jobs = None,
) -> None:
    """Probe a study's parts and train its controls: do they hold what the study rests on?"""
    wanted = load_study([s for s in study if "=" not in s], [s for s in study if "=" in s])
    from .. import compat
    from . import study as work
    from .audit import CheckFailed

    console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDE)
    compat.apply()
    try:
        work.check_study(wanted, out or Path("studies") / wanted.name, jobs=jobs, console=console)
    except CheckFailed as error:
        console.print(str(error), soft_wrap=True, highlight=False)
        raise typer.Exit(FAILED) from None


def _run(
    wanted: StudyConfig,
    out: Path | None,
    jobs: int | None,
    plan: bool,
    report: bool,
    trial: bool,
    check: bool = True,
) -> None:
    from .. import compat
    from . import study
    from .audit import CheckFailed

    console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDE)
    folder = out or Path("studies") / wanted.name
    if report:
        study.report(folder, console)
        return
    compat.apply()
    try:
        failed = study.run_study(
            wanted, folder, jobs=jobs, plan_only=plan, console=console, trial=trial, check=check
        )
    except CheckFailed as error:
        console.print(f"{error}; --without-check goes on all the same", soft_wrap=True, highlight=False)
        raise typer.Exit(FAILED) from None
    if failed:
        console.print(f"{failed} runs failed; the same command tries them again")
        raise typer.Exit(FAILED)


def _endpoint(given: str | None) -> EndpointConfig | None:
    if given is None:
        return None
    suite, separator, measure = given.partition("/")
    if not separator or not suite or not measure:
        raise UserError(f"--primary '{given}': use SUITE/MEASURE, such as minimal_pairs/pair_accuracy")
    return EndpointConfig(suite, measure)
