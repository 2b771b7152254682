"""Every planned run: its folder, its number, what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from ..report.markup import Markup, breakable, join, tag
from ..report.numbers import NOTHING, plain
from ..report.tables import table
from .tables import Found, endpoint_name, slug


def runs_table(found: Found) -> Markup:
    """Every planned run: its folder, its number, what became of it."""
    primary = found["endpoints"].get(found["primary"])
    head = ["Cell", "Tries", *(f"Seed {seed}" for seed in found["seeds"])]
    rows = []
    for name, cell in found["cells"].items():
        told = None if primary is None else primary["cells"][name]["level"]
        values = {} if told is None else dict(zip(told["seeds"], told["by_seed"], strict=True))
        cells: list[object] = [NOTHING if cell["tries"] is None else str(cell["tries"])]
        planned = {run["seed"]: run for run in cell["runs"]}
        cells += [_run(planned.get(seed), values.get(seed)) for seed in found["seeds"]]
        title = tag(
            "th", breakable(name), tag("small", ", ".join(cell["methods"]) or "no method"), scope="row"
        )
        rows.append(tag("tr", title, *(tag("td", c, class_="number") for c in cells), id=slug(found, name)))
    what = "" if primary is None else f": {endpoint_name(primary)} of {primary['suite']}, by seed"
    return table(f"Runs{what}", head, tag("tbody", *rows))


def _run(run: Mapping[str, Any] | None, value: float | None) -> Markup:
    if run is None:
        return tag("small", "not planned")
    number = NOTHING if value is None else plain(value, 3)
    if run["status"] == "done":
        return tag("a", number, href=f"{quote(run['folder'])}/", title=run["folder"])
    if run["status"] == "identical":
        told = tag("small", f"as {run['identical_to']}")
        return join(tag("a", number, href=f"{quote(run['folder'])}/") if run["folder"] else number, told)
    return join(
        tag("span", run["status"], class_="v-harms"), tag("small", run["why"] or "", class_="wrapped")
    )
