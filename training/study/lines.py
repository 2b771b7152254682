"""Lines of a check: what was asked, what was measured, what one scores that does not look, and whether it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..run_folder import write_atomically

CHECK = "check.json"
OK, FAILS, OPEN = "ok", "FAILS", "not tried"
FORMAT = 1
_EXACT = 1e-9  # .1 is no binary number


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        key: as in the YAML: ``target.colour``.
        what: in words.
        asked: in words.
        status: one of ``OK``, ``FAILS``, ``OPEN``.
        value: measured; None: it could not be.
        n: what it is a mean over.
        standard_error: of a share.
        low, high: 95 % interval of a difference.
        beside: what one scores that does not look, and what else the value is to be held against, by name.
        why: it could not be measured, or was not tried.
    """

    key: str
    what: str
    asked: str
    status: str
    value: float | None = None
    n: int | None = None
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    beside: Mapping[str, float] = field(default_factory=dict)
    why: str | None = None


def at_least(value: float | None, least: float) -> str:
    """Status of a value of which much is asked."""
    return OK if value is not None and value >= least - _EXACT else FAILS


def at_most(value: float | None, most: float) -> str:
    """Status of a value of which little is asked."""
    return OK if value is not None and value <= most + _EXACT else FAILS


def failed(lines: Sequence[Line]) -> list[Line]:
    """Lines that do not hold; not those that were not tried because of them."""
    return [line for line in lines if line.status == FAILS]


def as_table(lines: Sequence[Line], title: str) -> Table:
    """The check for a terminal."""
    table = Table(title=title, title_justify="left", show_edge=False)
    for column in ("line", "what", "asked", "measured", "n", "without looking", ""):
        table.add_column(column, justify="right" if column in ("measured", "n") else "left")
    for line in lines:
        n = "" if line.n is None else f"{line.n:,}"
        table.add_row(line.key, line.what, line.asked, measured(line), n, beside(line), line.status)
    return table


def measured(line: Line) -> str:
    """The value with its standard error or interval, or why there is none."""
    if line.value is None:
        return line.why or "-"
    if line.low is not None and line.high is not None:
        return f"{line.value:+.3f} ({line.low:+.3f} to {line.high:+.3f})"
    error = "" if line.standard_error is None else f" ±{line.standard_error:.3f}"
    return f"{line.value:.3f}{error}"


def beside(line: Line) -> str:
    """``majority .125, shuffled labels .118``."""
    return ", ".join(f"{name} {value:.3f}" for name, value in line.beside.items())


def write_check(out: Path, identity: str, lines: Sequence[Line]) -> None:
    """Write ``check.json``."""
    body = {
        "format": FORMAT,
        "identity": identity,
        "ok": not failed(lines),
        "lines": [asdict(x) for x in lines],
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / CHECK, json.dumps(body, indent=1) + "\n")


def read_check(out: Path, identity: str) -> list[Line] | None:
    """Lines of a check of the same settings; None: there was none, or its file is from something else."""
    try:
        body = json.loads((out / CHECK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known: dict[str, Any] = body if isinstance(body, dict) else {}
    if known.get("format") != FORMAT or known.get("identity") != identity:
        return None
    return [Line(**line) for line in known["lines"]]
