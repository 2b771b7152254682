"""What was to hold before any cell was trained, as a table of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report.markup import Markup, join, tag
from ..report.numbers import NOTHING, count, plain
from ..report.tables import table

Found = Mapping[str, Any]


def check_table(found: Found) -> Markup | None:
    """Line by line; None: none was asked, or nothing was measured."""
    check = found.get("check")
    if not check or not check["lines"]:
        return None
    head = ["Line", "Asked", "Measured", "n", "Without looking", "Holds"]
    rows = [_row(line) for line in check["lines"]]
    return table("Parts and controls, looked at before any cell was trained", head, tag("tbody", *rows))


def _row(line: Mapping[str, Any]) -> Markup:
    beside = [tag("small", f"{name} {plain(value, 3)}") for name, value in (line.get("beside") or {}).items()]
    n = line.get("n")
    cells = [
        line["asked"],
        _measured(line),
        NOTHING if n is None else count(n),
        join(*beside) if beside else NOTHING,
        "yes" if line["status"] == "ok" else "no" if line["status"] == "FAILS" else line["status"],
    ]
    name = join(line["key"], tag("small", line["what"]))
    return tag("tr", tag("th", name, scope="row"), *(tag("td", one, class_="number") for one in cells))


def _measured(line: Mapping[str, Any]) -> Markup:
    value = line.get("value")
    if value is None:
        return tag("small", line.get("why") or NOTHING, class_="wrapped")
    if line.get("low") is not None and line.get("high") is not None:
        return join(plain(value, 3), tag("small", f"{plain(line['low'], 3)} to {plain(line['high'], 3)}"))
    error = line.get("standard_error")
    return join(plain(value, 3), tag("small", f"±{plain(error, 3)}") if error is not None else None)
