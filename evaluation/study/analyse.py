"""A study's runs -> everything that may be said of them, as one JSON object."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from . import factorial
from .bootstrap import LEVEL, REPLICATES, Estimate
from .folder import METHOD_ROLES, Cell, Endpoint, Study, read_study
from .measures import form
from .multiple import holm
from .outcomes import outcomes_of
from .power import POWER, detectable
from .reading import Read, primary_of, read_runs
from .resampled import Resampled
from .run_files import contributions, costs, curves, tries, unlike
from .verdicts import CEILING, floor_and_ceiling, placebos_of, verdict

ABLATION = "ablation.json"
FORMAT = 1


def analyse(folder: Path) -> dict[str, Any]:
    """Read a study's runs and compute everything that its report shows.

    The same files give the same numbers, whatever the order of cells, seeds and lines in them. ``docs/studies.md`` explains
    each number.

    Args:
        folder: with ``study.json`` and the runs' folders.

    Returns:
        what ``ablation.json`` holds.

    Raises:
        UserError: see ``folder.read_study`` and ``reading.read_runs``.
    """
    study = read_study(Path(folder))
    return analysed(study, read_runs(study))


def write_analysis(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write ``ablation.json``, whole or not at all."""
    path = Path(folder) / ABLATION
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def analysed(study: Study, read: Read) -> dict[str, Any]:
    """The analysis of runs that are read already; ``read.problems`` grows by what is found on the way."""
    fixed, study = study.primary is not None, replace(study, primary=primary_of(study, read))
    asked = {one.suite for one in read.endpoints}
    for one in study.endpoints:
        if one.suite not in asked:
            read.problems.append(f"{one.key}: an endpoint of the study, but no run was asked {one.suite}")
    endpoints = [one for one in study.endpoints if one.suite in asked]
    endpoints += [one for one in read.endpoints if one not in endpoints]
    lacking = factorial.lacking(study) if study.factors else []
    if lacking:
        read.problems.append(f"the factorial lacks {', '.join(lacking)}: no main effects and interactions")
    results = {one.key: _endpoint(study, read, one, not lacking) for one in endpoints}
    _correct(study, endpoints, results)
    versions = _versions(read)
    read.problems += unlike(study)
    return {
        "format": FORMAT,
        "name": study.name,
        "question": study.question,
        "versions": {"opsin": __version__, "numpy": np.__version__, "runs": versions},
        "method": {
            "interval": f"{LEVEL:.0%}, two-level bootstrap (seeds, pictures), percentiles stretched by t",
            "replicates": REPLICATES, "correction": "Holm, over the secondary endpoints of a cell",
            "ceiling": CEILING, "power": POWER,
        },
        "seeds": list(study.seeds),
        "baseline": study.baseline,
        "factors": list(study.factors),
        "primary": study.endpoints[0].key,
        "primary_fixed": fixed,
        "check": study.check,
        "secondary": [one.key for one in study.secondary],
        "cells": {name: _cell(study, read, cell) for name, cell in study.cells.items()},
        "endpoints": results,
        "contribution": contributions(study, read),
        "costs": costs(study),
        "curves": curves(study, read),
        "alarms": _alarms(study, results, fixed),
        "problems": list(dict.fromkeys(read.problems)),
        "checked": read.checked,
    }  # fmt: skip


def _versions(read: Read) -> list[dict[str, str]]:
    """With what the runs were scored; several are named among the problems."""
    found = sorted({tuple(sorted(files.versions.items())) for files in read.runs.values()})
    told = [dict(one) for one in found]
    if len(told) > 1:
        words = "; ".join(", ".join(f"{k} {v}" for k, v in one.items()) or "not told" for one in told)
        read.problems.append(f"runs were scored by unlike versions: {words}")
    return told


def _cell(study: Study, read: Read, cell: Cell) -> dict[str, Any]:
    """What was planned of a cell, and what became of it."""
    runs = []
    for run in cell.runs:
        there = (cell.name, run.seed) in read.runs
        status = run.status if run.status != "done" or there else "failed"
        runs.append(
            {"seed": run.seed, "status": status, "why": run.why, "identical_to": run.identical_to,
             "folder": read.runs[cell.name, run.seed].folder if there else run.folder}
        )  # fmt: skip
    return {
        "methods": list(cell.methods), "role": cell.role, "placebo_of": cell.placebo_of, "matched_to": cell.matched_to,
        "placebos": placebos_of(study, cell), "tries": tries(cell), "runs": runs,
        "missing": _missing(read, cell), "identical_to": _identical(cell),
    }  # fmt: skip


def _missing(read: Read, cell: Cell) -> list[int]:
    return [run.seed for run in cell.runs if (cell.name, run.seed) not in read.runs]


def _identical(cell: Cell) -> str | None:
    """The cell that all runs of this one would repeat."""
    same = {run.identical_to for run in cell.runs}
    return next(iter(same)) if len(same) == 1 else None


def _endpoint(study: Study, read: Read, endpoint: Endpoint, complete: bool) -> dict[str, Any]:
    """All numbers of one endpoint; p-values of secondary ones are corrected later, then verdicts are given."""
    found = outcomes_of(read, endpoint)
    assert found is not None
    outcomes, problems = found
    read.problems += problems
    resampled = Resampled(outcomes)
    scorer = read.scorers[endpoint.suite]
    shape = form(scorer, endpoint.measure)
    kind = (
        "primary" if endpoint == study.primary else "secondary" if endpoint in study.secondary else "beside"
    )
    cells: dict[str, Any] = {}
    for name, cell in study.cells.items():
        level = resampled.level(name)
        against = cell.matched_to
        difference = None if against is None else resampled.difference(name, against)
        placebos = {one: resampled.difference(name, one) for one in placebos_of(study, cell)}
        reach = None
        if difference is not None and difference.standard_error:
            reach = asdict(detectable(difference.standard_error, difference.df or 1.0))
        cells[name] = {
            "level": _told(level), "difference": _told(difference), "against": against,
            "placebos": {one: _told(gap) for one, gap in placebos.items()}, "detectable": reach,
            "_difference": difference, "_placebos": placebos,
        }  # fmt: skip
    rooms = {
        name: floor_and_ceiling(
            resampled.level(name),
            _blind(read, endpoint, name),
            shape.unit,
            shape.better or 1,
            chance=_chance(read, endpoint, name),
        )
        for name, cell in study.cells.items()
        if cell.role == "baseline" or any(other.matched_to == name for other in study.cells.values())
    }
    effects = []
    if study.factors and complete:
        settings = factorial.settings(study)
        for effect in factorial.effects(study.factors):
            weights = factorial.contrast(study.factors, effect, settings)
            told = _told(resampled.contrast(weights))
            effects.append({"factors": list(effect), "effect": told})
    return {
        "suite": endpoint.suite, "measure": endpoint.measure, "of_kind": endpoint.kind, "role": kind,
        "unit": shape.unit, "better": shape.better, "scorer": f"{scorer.name}/{scorer.version}",
        "resampled": "pictures" if read.units[endpoint.suite].by_picture else "questions",
        "rooms": rooms, "room": rooms[study.baseline], "cells": cells, "effects": effects,
    }  # fmt: skip


def _told(one: Estimate | None) -> dict[str, Any] | None:
    """An estimate for JSON: ``spread`` is the standard deviation over seeds, ``over`` what the interval is over."""
    if one is None:
        return None
    finite = [value for value in one.by_seed if np.isfinite(value)]
    return {
        "value": one.value, "low": one.low, "high": one.high, "standard_error": one.standard_error,
        "df": None if one.df is None or not np.isfinite(one.df) else one.df, "p": one.p,
        "spread": statistics.stdev(finite) if len(finite) > 1 else None,
        "over": "nothing" if one.low is None else "seeds and pictures" if len(one.seeds) > 1 else "pictures",
        "seeds": list(one.seeds), "by_seed": [value if np.isfinite(value) else None for value in one.by_seed],
        "pictures": one.pictures, "n": one.n, "variance": one.variance,
    }  # fmt: skip


def _blind(read: Read, endpoint: Endpoint, cell: str) -> float | None:
    """What a cell's models score with other questions' pictures, mean over seeds."""
    values = []
    for (name, _), files in sorted(read.runs.items()):
        blind = files.scores.get(endpoint.suite, {}).get("blind") or {}
        of_kind = (
            blind.get("by_kind", {}).get(endpoint.kind, {}) if endpoint.kind else blind.get("measures", {})
        )
        value = of_kind.get(endpoint.measure, {}).get("value")
        if name == cell and value is not None:
            values.append(float(value))
    return statistics.fmean(values) if values else None


def _chance(read: Read, endpoint: Endpoint, cell: str) -> float | None:
    """What guessing among choices scores, for shares of right answers."""
    if endpoint.measure != "accuracy" or endpoint.kind:
        return None
    found = (files.suites.get(endpoint.suite) for (name, _), files in read.runs.items() if name == cell)
    return next((one.chance for one in found if one is not None), None)


def _correct(study: Study, endpoints: list[Endpoint], results: dict[str, Any]) -> None:
    """Holm's p over each cell's secondary endpoints that can be judged; then the verdicts."""
    secondary = [one.key for one in endpoints if one in study.secondary]
    for name, cell in study.cells.items():
        rows = {key: results[key]["cells"][name] for key in secondary}
        fit = {}
        for key, row in rows.items():
            room = results[key]["rooms"].get(cell.matched_to)
            if (
                row["difference"]
                and row["difference"]["p"] is not None
                and room
                and room["status"] == "judged"
            ):
                fit[key] = row["difference"]["p"]
        for key, p in zip(fit, holm(list(fit.values())), strict=True):
            rows[key]["holm_p"] = p
            rows[key]["holm_of"] = len(fit)
    for key, result in results.items():
        for name, cell in study.cells.items():
            row = result["cells"][name]
            difference, placebos = row.pop("_difference"), row.pop("_placebos")
            if cell.matched_to is None or result["role"] == "beside" or not result["better"]:
                row["verdict"] = None
                continue
            missing = sorted({run.seed for run in cell.runs} - set(difference.seeds if difference else ()))
            found = verdict(
                cell, result["rooms"][cell.matched_to], difference, placebos, result["better"],
                missing=missing, identical_to=_identical(cell), corrected=row.get("holm_p") if key in secondary else None,
            )  # fmt: skip
            row["verdict"] = asdict(found)


def _alarms(study: Study, results: Mapping[str, Any], fixed: bool) -> list[str]:
    """What a reader must know before any verdict."""
    found = [] if study.check is None else _of_check(study.check)
    seeds = [
        len(cell.runs)
        for cell in study.cells.values()
        if cell.role in METHOD_ROLES or cell.name == study.baseline
    ]
    if seeds and min(seeds) == 1:
        found.append(
            "Cells with one seed: their intervals are over pictures only. They say how sure the score of that one model is, "
            "not whether training again would give the same."
        )
    key = study.endpoints[0].key
    if not fixed:
        found.append(
            f"No primary endpoint was fixed before the runs; {key} was taken because it comes first. Its verdicts explore, "
            "they do not test."
        )
    primary = results.get(key)
    if primary is None:
        return [*found, f"The primary endpoint {key} was not measured: nothing is judged by it."]
    for name, cell in study.cells.items():
        said = primary["cells"][name]["verdict"]
        if cell.role == "positive" and (said is None or said["word"] != "better"):
            why = said["why"] if said else "it has no baseline"
            found.append(
                f"The positive control {name} is not clearly better than its baseline ({why}): the study may be unable to see "
                f"an effect at all."
            )
    return found


def _of_check(check: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the check before the runs: nothing, if all of it holds."""
    wrong = [line["key"] for line in check["lines"] if line["status"] == "FAILS"]
    if check["status"] == "failed":
        return [
            f"The check before the runs fails: {', '.join(wrong)}. What the study rests on does not hold."
        ]
    if check["status"] == "left out" and wrong:
        return [
            f"The check before the runs was left out, after it had failed: {', '.join(wrong)}. What the study rests on does not hold."
        ]
    if check["status"] == "left out":
        return ["The check before the runs was left out: whether what the study rests on holds is not known."]
    return []
