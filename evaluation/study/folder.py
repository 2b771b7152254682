"""``study.json``: what a study asks and which runs answer it, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import UserError, nearest

STUDY = "study.json"
ROLES = ("baseline", "factorial", "single", "control", "placebo", "positive")
METHOD_ROLES = ("factorial", "single")
"""Roles of cells that are judged as methods: they help only if they beat their placebos, too."""
STATUSES = ("done", "missing", "failed", "identical")
CHECKED = ("passed", "failed", "left out")


@dataclass(frozen=True)
class Endpoint:
    """One number that cells are compared by.

    Attributes:
        suite, measure: as ``scores.json`` names them; ``nll`` is the mean negative log-likelihood of the right answer (nats).
        kind: of questions; None: all of the suite.
    """

    suite: str
    measure: str
    kind: str | None = None

    @property
    def key(self) -> str:
        """Its name in ``ablation.json``."""
        return f"{self.suite}/{self.measure}" + (f"@{self.kind}" if self.kind else "")


@dataclass(frozen=True)
class Run:
    """A cell under one seed.

    Attributes:
        seed: of data order and initial weights.
        status: one of ``STATUSES``.
        folder: where its files are, relative to the study; None: it has none.
        why: of a run that is not there.
        identical_to: cell whose run this one would repeat bit for bit.
        cost: ``seconds``, ``seconds_a_step``, ``peak_bytes``, ``steps``, ``tokens``, as far as they are known.
        tries: settings that were tried on the dev split before this one was taken; None: not told.
    """

    seed: int
    status: str
    folder: str | None
    why: str | None
    identical_to: str | None
    cost: Mapping[str, Any]
    tries: int | None


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed alone.

    Attributes:
        name: of the cell.
        methods: that are switched on.
        role: one of ``ROLES``.
        placebo_of: cell whose placebo this one is.
        matched_to: the baseline it is held against; None: it is one itself.
        runs: by ascending seed, planned ones that are not there included.
    """

    name: str
    methods: tuple[str, ...]
    role: str
    placebo_of: str | None
    matched_to: str | None
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Study:
    """A study as it was planned.

    Attributes:
        folder: where ``study.json`` lies.
        name, question: in words.
        baseline: name of the cell without any method.
        primary: the endpoint that was fixed before the first run; None: none was.
        secondary: those that are corrected for being several.
        factors: methods of the complete factorial; empty: there is none.
        cells: by name, sorted (the baseline first).
        check: what was to hold before any cell was trained: ``status`` (one of ``CHECKED``) and ``lines``; None: none was asked.
    """

    folder: Path
    name: str
    question: str
    baseline: str
    primary: Endpoint | None
    secondary: tuple[Endpoint, ...]
    factors: tuple[str, ...]
    cells: Mapping[str, Cell]
    check: Mapping[str, Any] | None = None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Those that were fixed before the first run, the primary one first."""
        return (*([self.primary] if self.primary else []), *self.secondary)

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that some cell was planned with."""
        return tuple(sorted({run.seed for cell in self.cells.values() for run in cell.runs}))


def read_study(folder: Path) -> Study:
    """Read ``study.json``.

    Raises:
        UserError: there is none, or something in it cannot be; the line names what and where.
    """
    path = Path(folder) / STUDY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'no JSON'})"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no study, but a {type(found).__name__}")
    try:
        return _study(path, found)
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: {what}") from error


def _study(path: Path, found: Mapping[str, Any]) -> Study:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["cells"]:
        rows.setdefault(str(row["name"]), []).append(row)
    baseline = str(found["baseline"])
    if baseline not in rows:
        raise UserError(f"{path}: baseline '{baseline}': no cell of that name{nearest(baseline, rows)}")
    order = sorted(rows, key=lambda name: (name != baseline, name))
    cells = {name: _cell(path, name, rows[name], baseline, rows) for name in order}
    primary = _endpoint(found["primary"]) if found["primary"] is not None else None
    secondary = tuple(_endpoint(one) for one in found.get("secondary") or ())
    keys = [one.key for one in (primary, *secondary) if one is not None]
    double = next((key for key in keys if keys.count(key) > 1), None)
    if double:
        raise UserError(f"{path}: {double} is an endpoint twice")
    factors = tuple(str(one) for one in found.get("factors") or ())
    if len(set(factors)) < len(factors):
        raise UserError(f"{path}: factors: name each once")
    return Study(
        path.parent, str(found["name"]), str(found.get("question") or ""), baseline, primary, secondary, factors, cells,
        _check(path, found.get("check")),
    )  # fmt: skip


def _check(path: Path, found: Any) -> Mapping[str, Any] | None:
    if found is None:
        return None
    if found["status"] not in CHECKED:
        raise UserError(f"{path}: check: status '{found['status']}'{nearest(str(found['status']), CHECKED)}")
    lines = [{**line, "key": str(line["key"]), "status": str(line["status"])} for line in found["lines"]]
    return {"status": found["status"], "lines": lines}


def _endpoint(found: Mapping[str, Any]) -> Endpoint:
    kind = found.get("kind")
    return Endpoint(str(found["suite"]), str(found["measure"]), None if kind is None else str(kind))


def _cell(
    path: Path, name: str, rows: Sequence[Mapping[str, Any]], baseline: str, names: Mapping[str, Any]
) -> Cell:
    said = {
        key: {json.dumps(row.get(key)) for row in rows}
        for key in ("methods", "role", "placebo_of", "matched_to")
    }
    differing = next((key for key, values in said.items() if len(values) > 1), None)
    if differing:
        raise UserError(f"{path}: cell {name}: {differing} differs between its seeds")
    first = rows[0]
    role = str(first["role"])
    if role not in ROLES:
        raise UserError(f"{path}: cell {name}: role '{role}'{nearest(role, ROLES)}")
    placebo_of = first.get("placebo_of")
    matched = first.get("matched_to") or (None if role == "baseline" else baseline)
    for key, other in (("placebo_of", placebo_of), ("matched_to", matched)):
        if other is not None and other not in names:
            raise UserError(f"{path}: cell {name}: {key} '{other}': no such cell{nearest(str(other), names)}")
    runs = tuple(sorted((_run(path, name, row, names) for row in rows), key=lambda run: run.seed))
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: cell {name}: a seed occurs twice")
    methods = tuple(str(one) for one in first.get("methods") or ())
    return Cell(name, methods, role, placebo_of, None if matched == name else matched, runs)


def _run(path: Path, name: str, row: Mapping[str, Any], names: Mapping[str, Any]) -> Run:
    status, seed = str(row["status"]), int(row["seed"])
    where = f"{path}: cell {name}, seed {seed}"
    if status not in STATUSES:
        raise UserError(f"{where}: status '{status}'{nearest(status, STATUSES)}")
    same = row.get("identical_to")
    if status == "identical" and (same not in names or same == name):
        raise UserError(
            f"{where}: identical_to '{same}': no other cell of that name{nearest(str(same), names)}"
        )
    if status == "done" and not row.get("folder"):
        raise UserError(f"{where}: is done, but names no folder")
    tries = row.get("tries")
    return Run(
        seed, status, row.get("folder"), row.get("why"), same if status == "identical" else None,
        dict(row.get("cost") or {}), None if tries is None else int(tries),
    )  # fmt: skip
