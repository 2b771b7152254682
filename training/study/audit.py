"""``opsin study check``: what must hold of parts and controls before any cell is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ... import __version__
from ...models.errors import UserError, nearest
from ..config import to_plain
from ..eval_config import suites_of
from .check_config import CheckConfig, cell_of, targets_of
from .lines import CHECK, Line, as_table, failed, read_check, write_check
from .part_lines import method_of, part_lines
from .run_lines import run_lines, runs_needed
from .work import Work

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"
"""What ``study.json`` says of a check."""


class CheckFailed(Exception):
    """A line of a check does not hold; the text is one line that names all that do not."""


def refuse_unasked(work: Work, check: CheckConfig) -> None:
    """Refuse lines that no run of the study could answer, before anything is trained.

    Raises:
        UserError: a cell without the method whose target is meant, one that repeats another, or a suite that is not asked.
    """
    for key, one in targets_of(check).items():
        method_of(work.run_of(cell_of(one)), key, one.of)
    for key, cell in (("blind", check.blind), ("positive", check.positive)):
        if cell is not None and cell.cell in work.equal:
            other = work.equal[cell.cell][0]
            raise UserError(f"study: check.{key}.cell: {cell.cell} is {other} by construction; name {other}")
    if check.blind is not None:
        _asked("check.blind.suite", check.blind.suite, work)
    if check.positive is not None:
        assert work.config.primary is not None
        _asked("primary.suite", work.config.primary.suite, work)


def _asked(key: str, suite: str, work: Work) -> None:
    known = list(suites_of(work.config.evaluation).suites)
    if suite not in known:
        raise UserError(f"study: {key}: the evaluation has no suite '{suite}'{nearest(suite, known)}")


def audit(work: Work, check: CheckConfig, keep_pictures: Callable[[Work], None]) -> list[Line]:
    """Measure every line, print the table, write ``check.json``; what passed before under the same settings is taken from there.

    Probes come first, as they take seconds; where one fails, nothing is trained and the other lines are not tried. Runs are trained
    as the study would train them, and are the study's own afterwards.

    Args:
        work: the study.
        check: what is asked.
        keep_pictures: function that keeps the pictures of the suites beside the study, by which questions are resampled.
    """
    identity = _identity(work, check)
    lines = read_check(work.out, identity)
    if lines is not None and not failed(lines):
        work.console.print(f"check: passed before ({work.out / CHECK})", soft_wrap=True)
        return lines
    lines = part_lines(work, check)
    needed = runs_needed(work, check)
    if not failed(lines):
        missing = work.missing(needed)
        if missing:
            work.console.print(f"check: {len(missing)} runs to train first, which the study uses again")
        work.train(missing)
        if check.positive is not None:
            keep_pictures(work)
        lines += run_lines(work, check)
    else:
        lines += run_lines(work, check, tried=False)
    write_check(work.out, identity, lines)
    work.console.print(as_table(lines, f"{work.config.name}: before any cell is trained"))
    return lines


def verdict_of(lines: Sequence[Line]) -> str:
    """One line about what does not hold."""
    wrong = failed(lines)
    names = ", ".join(line.key for line in wrong)
    return f"check: {len(wrong)} of {len(lines)} lines {'fails' if len(wrong) == 1 else 'fail'}: {names}"


def for_study(work: Work, check: CheckConfig, lines: Sequence[Line] | None) -> dict[str, Any]:
    """What ``study.json`` says of a check.

    Args:
        work: the study.
        check: what is asked.
        lines: measured now; None: the check was left out. Then those of an earlier one of the same settings are told, if there are any.
    """
    status = LEFT_OUT
    if lines is None:
        lines = read_check(work.out, _identity(work, check)) or []
    else:
        status = FAILED if failed(lines) else PASSED
    return {"status": status, "lines": [asdict(line) for line in lines]}


def _identity(work: Work, check: CheckConfig) -> str:
    """Hash of what is asked and of the runs that it is asked of."""
    cells = {cell_of(one) for one in targets_of(check).values()}
    cells |= {one.cell for one in (check.tower, check.blind, check.positive) if one is not None}
    if check.positive is not None:
        cells.add(work.cells[check.positive.cell].matched_to or "baseline")
    plans = sorted((p.run.name, p.identity) for p in work.plans if p.run.cell.name in cells)
    primary = None if work.config.primary is None else vars(work.config.primary)
    body = json.dumps([__version__, to_plain(check), primary, plans])
    return hashlib.blake2b(body.encode(), digest_size=10).hexdigest()
