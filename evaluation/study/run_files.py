"""What else a run's folder has: Visual Contribution, learning curves, costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .folder import METHOD_ROLES, Cell, Study
from .over_seeds import over_seeds, paired, thinned
from .reading import Read

CONTRIBUTION = "analyses/visual_contribution.json"
METRICS = "metrics.jsonl"
TRAINED = "runs"
CURVE = "loss/train/lm"
"""The loss that all methods share; a method's own loss is no yardstick for another's."""

CONTROLS = ("other", "removed", "grey")
"""Of Visual Contribution; another picture is the one to trust, a grey one is mostly noise."""

UNLIKE = 0.01
"""Share by which steps or tokens of a cell may differ from its baseline's."""

COSTS = ("seconds_a_step", "peak_bytes", "seconds", "steps", "tokens")


def contributions(study: Study, read: Read) -> dict[str, Any]:
    """Visual Contribution of each cell, beside the accuracy on the same questions. Empty: no run has it.

    Returns:
        cell -> ``accuracy`` and ``vc/CONTROL``, each with ``over_seeds``' numbers and ``difference`` to the baseline's; ``n``
        and ``pictures`` of one run.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for (cell, seed), files in sorted(read.runs.items()):
        path = study.folder / files.folder / CONTRIBUTION
        if not path.is_file():
            continue
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            entry["measures"]["accuracy/image"]["value"]
        except (OSError, ValueError, KeyError, TypeError):
            read.problems.append(f"{cell}, seed {seed}: {CONTRIBUTION} is no Visual Contribution")
            continue
        found.setdefault(cell, {})[seed] = entry
    result: dict[str, Any] = {}
    for name, cell in study.cells.items():
        if name not in found:
            continue
        entries, row = found[name], {}
        for key, measure in (("accuracy", "accuracy/image"), *((f"vc/{c}", f"vc/{c}") for c in CONTROLS)):
            values, errors = _column(entries, measure, "value"), _column(entries, measure, "standard_error")
            row[key] = over_seeds(values, errors)
            if cell.matched_to in found:
                row[key]["difference"] = paired(values, _column(found[cell.matched_to], measure, "value"))
        first = next(iter(entries.values()))
        result[name] = {"n": first.get("questions"), "pictures": first.get("pictures"), **row}
    return result


def _column(entries: Mapping[int, Mapping[str, Any]], measure: str, key: str) -> dict[int, float]:
    values = {seed: entry["measures"].get(measure, {}).get(key) for seed, entry in entries.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def curves(study: Study, read: Read) -> dict[str, Any]:
    """Learning curves, ``CURVE`` against steps of all stages, each the mean over seeds with its least and greatest.

    Returns:
        cell -> ``steps``, ``mean``, ``low``, ``high`` (lists), ``seeds``, ``stages`` (name and first step).
    """
    result: dict[str, Any] = {}
    for name in study.cells:
        lines, stages = {}, {}
        for run in study.cells[name].runs:
            files = read.runs.get((name, run.seed))
            if files is None or run.identical_to is not None:
                continue
            path = _metrics(study.folder, files.folder)
            if path is not None:
                points, stages = _curve(path)
                if points:
                    lines[run.seed] = thinned(points)
        if not lines:
            continue
        end = min(line[-1][0] for line in lines.values())
        longest = max(lines.values(), key=len)
        grid = np.array([x for x, _ in longest if x <= end])
        drawn = np.array([np.interp(grid, *np.array(line).T) for line in lines.values()])
        result[name] = {
            "steps": grid.tolist(), "mean": drawn.mean(0).tolist(), "low": drawn.min(0).tolist(),
            "high": drawn.max(0).tolist(), "seeds": sorted(lines), "stages": stages,
        }  # fmt: skip
    return result


def _metrics(study: Path, folder: str) -> Path | None:
    """Metrics of a run: beside its scores, or in the folder of the training of the same name."""
    places = (study / folder / METRICS, study / TRAINED / Path(folder).name / METRICS)
    return next((path for path in places if path.is_file()), None)


def _curve(path: Path) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """(step over all stages, loss), and the step at which each stage starts; a line cut off by a kill is left out."""
    points: list[tuple[float, float]] = []
    stages: dict[str, float] = {}
    before = last = 0.0
    stage = None
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            step, value = entry.get("step"), entry.get(CURVE)
            if not isinstance(step, int | float):
                continue
            if entry.get("stage") != stage:
                stage, before = entry.get("stage"), last
                stages[str(stage)] = before
            last = before + step
            if isinstance(value, int | float) and math.isfinite(value):
                points.append((last, float(value)))
    return points, stages


def costs(study: Study) -> dict[str, Any]:
    """Costs of each cell over its seeds, and their ratio to its baseline's, by seed.

    Returns:
        cell -> cost -> ``over_seeds``' numbers with ``ratio``.
    """
    known = {
        name: {
            cost: {
                run.seed: float(run.cost[cost])
                for run in cell.runs
                if run.status == "done" and isinstance(run.cost.get(cost), int | float)
            }
            for cost in COSTS
        }
        for name, cell in study.cells.items()
    }
    result: dict[str, Any] = {}
    for name, cell in study.cells.items():
        row: dict[str, Any] = {cost: over_seeds(values) for cost, values in known[name].items() if values}
        for cost, entry in row.items():
            if cell.matched_to is not None and known[cell.matched_to][cost]:
                entry["ratio"] = paired(known[name][cost], known[cell.matched_to][cost], ratio=True)
        result[name] = row
    return result


def tries(cell: Cell) -> int | None:
    """Settings tried for a cell on the dev split; None: not told."""
    told = [run.tries for run in cell.runs if run.tries is not None]
    return max(told) if told else None


def unlike(study: Study) -> list[str]:
    """In words, what makes a comparison unfair: other numbers of tries, steps or tokens than the baseline's."""
    found = []
    counts = {name: tries(cell) for name, cell in study.cells.items()}
    known = {name: count for name, count in counts.items() if count is not None}
    if len(set(known.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in known.items())
        found.append(f"cells were tuned with unlike numbers of tries: {told}")
    for name, cell in study.cells.items():
        if cell.role not in METHOD_ROLES or cell.matched_to is None:
            continue
        other = {run.seed: run.cost for run in study.cells[cell.matched_to].runs if run.status == "done"}
        for cost in ("steps", "tokens"):
            pairs = [
                (run.cost[cost], other[run.seed][cost])
                for run in cell.runs
                if run.status == "done" and run.cost.get(cost) and other.get(run.seed, {}).get(cost)
            ]
            apart = next(((own, its) for own, its in pairs if abs(own / its - 1) > UNLIKE), None)
            if apart is not None:
                found.append(
                    f"{name}: {apart[0]:,.0f} {cost}, {cell.matched_to} {apart[1]:,.0f}: not matched"
                )
    return found
