"""Lines of a check that need runs: a model that was trained without looking, and one that must be better."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...evaluation.study.analyse import analyse
from ...evaluation.study.folder import Endpoint
from ...models.errors import UserError
from .check_config import BlindCheck, CheckConfig, PositiveCheck
from .lines import FAILS, OK, OPEN, Line, at_least, at_most
from .spec import BASELINE
from .work import Work

SCORES = "scores.json"


def runs_needed(work: Work, check: CheckConfig) -> list[str]:
    """Names of the runs that the check asks for: one of the cell that was trained blindly, all of the comparison's.

    One seed of the blind cell does: its lines ask of the data what can be learnt of it without looking, of which another seed
    says the same; how sure it is comes from the questions. The positive control is a comparison as the study's own.
    """
    names = []
    if check.blind is not None:
        names.append(work.run_of(check.blind.cell).name)
    if check.positive is not None:
        cell = work.cells[check.positive.cell]
        names += [
            f"{name}-{seed}" for seed in cell.seeds for name in (cell.matched_to or BASELINE, cell.name)
        ]
    return names


def run_lines(work: Work, check: CheckConfig, tried: bool = True) -> list[Line]:
    """The lines about runs that were trained and asked.

    Args:
        work: the study.
        check: what is asked.
        tried: else every line says that it was not.
    """
    lines = [] if check.blind is None else _blind(work, check.blind, tried)
    return lines if check.positive is None else [*lines, _positive(work, check.positive, tried)]


def _blind(work: Work, check: BlindCheck, tried: bool) -> list[Line]:
    run = work.run_of(check.cell)
    ended = work.told.get(run.name, {})
    entry, why = {}, None
    if not tried:
        why = "not tried: a line above fails"
    elif ended.get("status") != "done":
        why = f"{run.name}: {ended.get('why') or ended.get('status', 'missing')}"
    else:
        entry = _suite(run.folder, check.suite)
    lines = []
    for key, asked, least in (("aligned", check.aligned, True), ("conflict", check.conflict, False)):
        if asked is None:
            continue
        head = (f"blind.{key}", f"right where habit {'is right' if least else 'is wrong'} ({run.name})",
                f"at {'least' if least else 'most'} {asked:g}")  # fmt: skip
        if not tried:
            lines.append(Line(*head, OPEN, why=why))
            continue
        found = entry.get("measures", {}).get(f"{key}_accuracy") or {}
        value = found.get("value")
        if value is None:
            lines.append(Line(*head, FAILS, why=why or f"{check.suite} has no {key}_accuracy"))
            continue
        unseen = (entry.get("blind") or {}).get("measures", {}).get(f"{key}_accuracy", {}).get("value")
        lines.append(
            Line(
                *head, at_least(value, asked) if least else at_most(value, asked), value, found.get("n"),
                found.get("standard_error"), beside={} if unseen is None else {"another picture": unseen},
            )
        )  # fmt: skip
    return lines


def _suite(folder: Path, suite: str) -> Mapping[str, Any]:
    """A suite of a run's ``scores.json``."""
    body = json.loads((folder / SCORES).read_text(encoding="utf-8"))
    return body["suites"].get(suite, {})


def _positive(work: Work, check: PositiveCheck, tried: bool) -> Line:
    primary = work.config.primary
    assert primary is not None
    cell = work.cells[check.cell]
    against = cell.matched_to or BASELINE
    endpoint = Endpoint(primary.suite, primary.measure)
    head = ("positive", f"{endpoint.key}: {cell.name} against {against}")
    if not tried:
        return Line(*head, "better", OPEN, why="not tried: a line above fails")
    names = [f"{name}-{seed}" for seed in cell.seeds for name in (against, cell.name)]
    told = {name: work.told.get(name, {}) for name in names}
    undone = [name for name, one in told.items() if one.get("status") != "done"]
    if undone:
        one = told[undone[0]]
        return Line(
            *head, "better", FAILS, why=f"{undone[0]}: {one.get('why') or one.get('status', 'missing')}"
        )
    try:
        result = analyse(work.out)["endpoints"].get(endpoint.key)
    except UserError as error:
        return Line(*head, "better", FAILS, why=str(error))
    if result is None:
        return Line(*head, "better", FAILS, why=f"no run was asked {primary.suite}")
    better, row = result["better"], result["cells"][cell.name]
    gap, level = row["difference"], result["cells"][against]["level"]
    beside = {} if not level or level["value"] is None else {against: level["value"]}
    blind = result["rooms"][against]["blind"]
    if blind is not None:
        beside[f"{against}, another picture"] = blind
    asked = "interval above 0" if better > 0 else "interval below 0"
    if not gap or gap["low"] is None:
        return Line(*head, asked, FAILS, beside=beside, why="no interval: nothing to measure")
    clear = gap["low"] > 0 if better > 0 else gap["high"] < 0
    return Line(
        *head, asked, OK if clear else FAILS, gap["value"], gap["n"], gap["standard_error"], gap["low"], gap["high"], beside
    )  # fmt: skip
