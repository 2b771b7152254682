"""What a run of lmms-eval left: its numbers, or the first thing that went wrong."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ...models.errors import UserError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(
    r"(?:\[rank\d+\]: )?((?:\w+\.)*(\w*(?:Error|Exception|Rejected|Interrupt|Exit|Failure)))(?:: (.*))?"
)
_LONGEST = 400


def read_results(folder: Path, asked: Sequence[str]) -> dict[str, Any]:
    """Numbers of all asked tasks; see ``run.run_lmms``.

    Args:
        folder: of one run.
        asked: names of tasks, groups, tags and patterns.

    Raises:
        UserError: no result file, or one without a number for some of them, which the line names.
    """
    files = sorted(folder.rglob("*_results.json"))
    if not files:
        raise UserError(f"no results for {', '.join(asked)}")
    found = json.loads(files[-1].read_text(encoding="utf-8"))
    result = numbers(found, asked)
    for name, task in result["tasks"].items():
        answers = next(folder.rglob(f"*_samples_{name}.jsonl"), None)
        task["samples"] = None if answers is None else str(answers.relative_to(folder))
    return result


def numbers(found: Mapping[str, Any], asked: Sequence[str]) -> dict[str, Any]:
    """Numbers of all asked tasks.

    Args:
        found: results as lmms-eval gives them.
        asked: names of tasks, groups, tags and patterns.

    Raises:
        UserError: some of them have none; the line names them.
    """
    counts = {name: entry["effective"] for name, entry in found["n-samples"].items()}
    members = {name: list(names) for name, names in found.get("group_subtasks", {}).items() if names}
    measured = {name: _measures(entry, counts.get(name, 0)) for name, entry in found["results"].items()}
    tasks = {
        name: {"n": counts[name], "primary": next(iter(measures), None), "measures": measures}
        for name, measures in measured.items()
        if name in counts
    }
    tags = {name: _tags(config) for name, config in found.get("configs", {}).items()}
    lacking = []
    for name in asked:
        wanted = _leaves(name, members) if name in members else [name] if name in tasks else []
        wanted = wanted or [one for one in tasks if name in tags.get(one, ()) or fnmatch(one, name)]
        if not wanted or not all(one in tasks and tasks[one]["measures"] and counts[one] for one in wanted):
            lacking.append(name)
    if lacking:
        raise UserError(f"no results for {', '.join(lacking)}")
    return {
        "tasks": tasks,
        "groups": {
            name: {"tasks": _leaves(name, members), "measures": measured.get(name, {})} for name in members
        },
    }


def _measures(entry: dict[str, Any], n: int) -> dict[str, dict[str, Any]]:
    """Finite numbers of a task. Of standard errors only ``_stderr``: ``_stderr_clt`` of POPE's precision, recall and F1 is
    that of accuracy."""
    measures = {}
    for key, value in entry.items():
        name, _, filtered = key.partition(",")
        if "_stderr" in name or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            continue
        error = entry.get(f"{name}_stderr,{filtered}")
        number = isinstance(error, int | float) and math.isfinite(error)
        shown = name if filtered in ("", "none") else f"{name}/{filtered}"
        measures[shown] = {
            "value": float(value),
            "n": n,
            "standard_error": float(error) if number and error is not None else None,
            "unit": "share" if 0 <= value <= 1 else "number",
        }
    return measures


def _leaves(name: str, members: dict[str, list[str]]) -> list[str]:
    if name not in members:
        return [name]
    return [leaf for one in members[name] for leaf in _leaves(one, members)]


def _tags(config: dict[str, Any]) -> list[str]:
    tags = config.get("tag") or []
    return [tags] if isinstance(tags, str) else list(tags)


def first_error(log: Path, code: int) -> str:
    """The error that a run's log tells of first, in one line: later ones are mostly what it led to.

    Args:
        log: standard output and error of the run.
        code: its exit status; negative: the signal that ended it.
    """
    if code < 0:
        return f"it was ended by {signal.strsignal(-code) or -code}" + (
            ", perhaps for lack of memory" if code == -9 else ""
        )
    lines = [
        _COLOUR.sub("", line).rstrip()
        for line in log.read_text(encoding="utf-8", errors="replace").split("\n")
    ]
    trace = False
    for line in lines:
        trace = trace or line.endswith("Traceback (most recent call last):")
        raised = _RAISED.fullmatch(line) if trace else None
        if raised:
            said = raised[3] or ""
            return _short(said if raised[2] == "UserError" else f"{raised[2]}: {said}" if said else raised[2])
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return _short(f"exit status {code}: {last.strip()}")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
