"""Files of scores: read, made again from predictions without a model, shown."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import __version__
from ..evaluation.records import read_predictions, write_predictions
from ..evaluation.rescore import rescore
from ..models.errors import UserError
from .run_folder import write_atomically

SCORES = "scores.json"


def now() -> str:
    """The time, as scores name it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_scores(path: Path, what: str) -> dict[str, Any]:
    """A ``scores.json``.

    Raises:
        UserError: there is none, or it is something else.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what}: {path}: cannot be read ({getattr(error, 'strerror', None) or 'no JSON'})"
        ) from error
    if not isinstance(scores, dict) or not isinstance(scores.get("suites"), dict):
        raise UserError(f"{what}: {path}: no scores.json of opsin eval")
    return scores


def rescore_file(path: Path, given: Sequence[str], out: Path | None, console: Console) -> Path:
    """``opsin eval --rescore``: scores of predictions that are there, without a model.

    Args:
        path: ``predictions.jsonl``, of ``opsin eval`` or made by hand.
        given: ``SUITE=SCORER`` where a prediction names none, or another scorer is wanted.
        out: folder to write; None: beside the predictions, as ``rescored.json``.
        console: for the table.

    Returns:
        the written scores.
    """
    records = read_predictions(path)
    chosen: dict[str, str] = {}
    for argument in given:
        suite, separator, scorer = argument.partition("=")
        if not separator or suite not in {r["suite"] for r in records}:
            known = ", ".join(sorted({r["suite"] for r in records}))
            raise UserError(f"--scorer {argument}: use SUITE=SCORER with a suite of {path} ({known})")
        chosen[suite] = scorer
    named: set[str] = set()
    for record in records:
        if record["suite"] not in chosen:
            if not isinstance(record.get("scorer"), str):
                raise UserError(
                    f"{path}: suite {record['suite']} names no scorer; give --scorer {record['suite']}=NAME"
                )
            chosen[record["suite"]] = record["scorer"]
            named.add(record["suite"])
        elif record["suite"] in named and record.get("scorer") != chosen[record["suite"]]:
            raise UserError(
                f"{path}: suite {record['suite']} names scorers {chosen[record['suite']]} and {record.get('scorer')}; "
                f"give --scorer {record['suite']}=NAME"
            )
    marked, found = rescore(records, chosen)
    before = path.parent / SCORES
    known = read_scores(before, "scores")["suites"] if before.is_file() else {}
    kept = ("suite", "group", "mode", "prompt_sha256", "errors")
    scores = {
        "predictions": str(path),
        "opsin": __version__,
        "created": now(),
        "suites": {
            name: {**{k: v for k, v in known.get(name, {}).items() if k in kept}, **one.as_dict()}
            for name, one in found.items()
        },
    }
    target = (out or path.parent) / "rescored.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(scores, indent=1) + "\n")
    write_predictions(target.with_suffix(".jsonl"), marked)
    console.print(as_table(scores, str(path)))
    return target


def as_table(scores: dict[str, Any], title: str) -> Table:
    """Scores for a terminal: the primary measure of each suite, and of its kinds."""
    table = Table(title=title, title_justify="left")
    table.add_column("suite")
    table.add_column("measure")
    for header in ("n", "score", "blind: another picture", "unparsed"):
        table.add_column(header, justify="right")
    for name, entry in scores["suites"].items():
        primary = entry["primary"]
        unseen = entry.get("blind", {})
        rows = [("", entry["measures"], unseen.get("measures", {}))]
        rows += [
            (kind, measures, unseen.get("by_kind", {}).get(kind, {}))
            for kind, measures in entry["by_kind"].items()
        ]
        for kind, measures, blind in rows:
            name_of = primary if primary in measures else "accuracy"  # a kind may not have what the whole has
            if name_of not in measures:
                continue
            found = measures[name_of]
            table.add_row(
                f"  {kind}" if kind else name,
                f"{primary} ({entry['scorer']})" if not kind else "" if name_of == primary else name_of,
                str(found["n"]),
                _shown(found),
                _shown(blind.get(name_of)),
                _shown(measures.get("unparsed")),
            )
    for name, task in scores.get("lmms", {}).get("tasks", {}).items():
        found = task["measures"].get(task["primary"] or "")
        number = _shown(found) if found else "-"
        table.add_row(name, f"{task['primary'] or ''} (lmms-eval)", str(task["n"]), number, "-", "-")
    return table


def _shown(measure: dict[str, Any] | None) -> str:
    if measure is None or measure["value"] is None:
        return "-"
    error = measure["standard_error"]
    return f"{measure['value']:.2f}" + (f" ±{error:.2f}" if error is not None else "")
