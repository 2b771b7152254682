"""Predictions of all runs, read and scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from ..records import read_predictions
from ..scorers import Scorer, make
from .folder import Cell, Endpoint, Run, Study
from .measures import form
from .pictures import Units, read_index
from .resampled import RunKey
from .suite_of_run import Judged, SuiteOfRun, suite_of_run

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"
VERSIONS = ("opsin", "torch", "transformers")
"""Keys of ``scores.json``."""

PRIOR = ("conflict_accuracy", "aligned_accuracy", "balanced_accuracy", "prior_answer_rate")
"""Measures that stand beside each other wherever questions have a prior answer."""


@dataclass
class RunFiles:
    """What was read of a run.

    Attributes:
        cell, run: whose it is.
        folder: relative to the study.
        scores: suites of its ``scores.json``.
        versions: of what it was scored with.
        suites: suite -> what was read of it.
    """

    cell: Cell
    run: Run
    folder: str
    scores: Mapping[str, Any]
    versions: Mapping[str, str]
    suites: dict[str, SuiteOfRun] = field(default_factory=dict)


@dataclass
class Read:
    """All runs of a study.

    Attributes:
        runs: (cell, seed) -> what was read; those that repeat another cell's have that one's answers.
        problems: runs and suites that are not there, in words.
        scorers: suite -> its scorer.
        endpoints: those of the study, then the measures that are shown beside them.
        units: suite -> its pictures.
        records: suite -> id -> what every run was asked (without answers).
        checked: numbers that were held against ``scores.json`` and agree.
        judged: suite -> what a scorer made of an answer: runs give few different ones.
    """

    runs: dict[RunKey, RunFiles]
    problems: list[str]
    scorers: dict[str, Scorer]
    endpoints: list[Endpoint]
    units: dict[str, Units]
    records: dict[str, dict[str, Mapping[str, Any]]]
    checked: int = 0
    judged: dict[str, Judged] = field(default_factory=dict)


def read_runs(study: Study) -> Read:
    """Read every run that is done.

    A run whose files cannot be read is named among ``problems`` and counts as failed.

    Raises:
        UserError: the baseline has no run, scorers of a suite differ between runs, or an endpoint is none of its suite's.
    """
    found = Read({}, [], {}, [], {}, {})
    for cell in study.cells.values():
        for run in cell.runs:
            if run.status == "done":
                _read_run(study, cell, run, found)
            elif run.status in ("missing", "failed"):
                why = f": {run.why}" if run.why else ""
                found.problems.append(f"{cell.name}, seed {run.seed}: {run.status}{why}")
    _resolve_identical(study, found)
    if not any(cell == study.baseline for cell, _ in found.runs):
        raise UserError(f"{study.folder}: the baseline '{study.baseline}' has no run that can be read")
    digests = read_index(study.folder)
    for suite, records in found.records.items():
        found.units[suite] = Units(records.values(), found.scorers[suite].name, digests.get(suite, {}))
    return found


def primary_of(study: Study, read: Read) -> Endpoint:
    """The study's primary endpoint; where none was fixed, what stands for the first suite that the baseline was asked."""
    if study.primary is not None:
        return study.primary
    first = next(files for (cell, _), files in sorted(read.runs.items()) if cell == study.baseline)
    suite = next((name for name in first.scores if name in first.suites), next(iter(first.suites)))
    return next(one for one in read.endpoints if one.suite == suite and one not in study.secondary)


def _read_run(study: Study, cell: Cell, run: Run, found: Read) -> None:
    reference = found.records
    assert run.folder is not None
    folder = study.folder / run.folder
    try:
        records = read_predictions(folder / PREDICTIONS)
        body = _scores(folder / SCORES)
    except UserError as error:
        found.problems.append(
            f"{cell.name}, seed {run.seed}: {str(error).replace(str(study.folder) + '/', '')}"
        )
        return
    by_suite: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_suite.setdefault(record["suite"], []).append(record)
    scores = body["suites"]
    versions = {name: str(body[name]) for name in VERSIONS if name in body}
    files = RunFiles(cell, run, run.folder, scores, versions)
    for suite, those in by_suite.items():
        name = those[0].get("scorer") or str(scores.get(suite, {}).get("scorer", "")).partition("/")[0]
        if not name:
            raise UserError(f"{folder / PREDICTIONS}: suite {suite} names no scorer")
        if suite not in found.scorers:
            found.scorers[suite] = make(name)
        elif found.scorers[suite].name != make(name).name:
            raise UserError(
                f"{folder / PREDICTIONS}: suite {suite} is scored by {name}, by {found.scorers[suite].name} in other runs"
            )
        if suite not in reference:
            reference[suite] = {}
            found.endpoints += _endpoints(study, suite, found.scorers[suite], those)
        known = reference[suite]
        if len(known) != len(those) or any(record["id"] not in known for record in those):
            for record in those:
                known.setdefault(
                    record["id"],
                    {k: record[k] for k in ("id", "question", "gold", "kind", "meta", "choices")},
                )
        wanted = [one for one in found.endpoints if one.suite == suite]
        files.suites[suite] = suite_of_run(
            found.scorers[suite], those, wanted, found.judged.setdefault(suite, {})
        )
    _check(files, found)
    found.runs[cell.name, run.seed] = files


def _endpoints(
    study: Study, suite: str, scorer: Scorer, records: Sequence[Mapping[str, Any]]
) -> list[Endpoint]:
    """The study's endpoints of a suite; then its scorer's own measure, and what is said of priors."""
    own = [one for one in study.endpoints if one.suite == suite]
    for one in own:
        if form(scorer, one.measure).better == 0:
            raise UserError(
                f"{study.folder}: {one.key}: neither more nor less of it is better; compare by another measure"
            )
    others = [Endpoint(suite, _shown(scorer, records))]
    splits = {record["meta"].get("split") for record in records}
    if {"aligned", "conflict"} & splits and any(r["meta"].get("prior") is not None for r in records):
        others += [Endpoint(suite, name) for name in PRIOR if name in _names(scorer)]
    return own + [one for one in others if one not in own]


def _names(scorer: Scorer) -> set[str]:
    found = set()
    for name in PRIOR:
        try:
            form(scorer, name)
        except UserError:
            continue
        found.add(name)
    return found


def _shown(scorer: Scorer, records: Sequence[Mapping[str, Any]]) -> str:
    """The measure that stands for a suite: pairs where there are any, else its scorer's own."""
    if scorer.name.startswith("scenes") and all(r["meta"].get("pair") is not None for r in records):
        return "pair_accuracy"
    return scorer.primary


def _scores(path: Path) -> Mapping[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        suites = body["suites"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or "no scores.json of opsin eval"
        raise UserError(f"{path}: cannot be read ({why})") from error
    if not isinstance(suites, dict):
        raise UserError(f"{path}: no scores.json of opsin eval")
    return body


def _check(files: RunFiles, found: Read) -> None:
    """Hold what comes out of the predictions against the run's own scores of the same scorer."""
    for suite, those in files.suites.items():
        entry, scorer = files.scores.get(suite, {}), found.scorers[suite]
        if entry.get("scorer") != f"{scorer.name}/{scorer.version}":
            continue
        for one, columns in those.columns.items():
            said = entry.get("measures", {}).get(one.measure)
            if one.kind is not None or not said or said.get("value") is None:
                continue
            value = float(form(scorer, one.measure).value(columns.sum(0)))
            if abs(value - said["value"]) > 1e-9:
                raise UserError(
                    f"{files.folder}: {one.key} is {said['value']:.4f} in {SCORES}, but {value:.4f} by {PREDICTIONS}: "
                    f"they are of different runs"
                )
            found.checked += 1


def _resolve_identical(study: Study, found: Read) -> None:
    """Runs that would repeat another cell's get its answers."""
    for cell in study.cells.values():
        for run in cell.runs:
            same, passed = run.identical_to, {cell.name}
            while same is not None and same not in passed and (same, run.seed) not in found.runs:
                passed.add(same)
                there = next((r for r in study.cells[same].runs if r.seed == run.seed), None)
                same = None if there is None else there.identical_to
            if run.status != "identical":
                continue
            other = found.runs.get((same, run.seed)) if same is not None else None
            if other is None:
                found.problems.append(
                    f"{cell.name}, seed {run.seed}: identical to {run.identical_to}, which has no such run"
                )
            else:
                found.runs[cell.name, run.seed] = RunFiles(
                    cell, run, other.folder, other.scores, other.versions, other.suites
                )
