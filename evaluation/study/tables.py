"""Tables of a study's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report.analyses import CAUTION
from ..report.markup import Markup, breakable, join, tag
from ..report.numbers import NOTHING, count, plain
from ..report.tables import table
from . import words
from .reading import PRIOR
from .run_files import CONTROLS

Found = Mapping[str, Any]
"""What ``ablation.json`` holds."""

ROLES = {
    "baseline": "Baselines",
    "factorial": "Factorial",
    "single": "Methods",
    "positive": "Positive control",
    "placebo": "Placebos",
    "control": "Controls",
}
GREYED = {"floor": "at floor", "ceiling": "at ceiling", "unknown": "no interval"}


def slug(found: Found, name: str) -> str:
    """Anchor of a cell's runs."""
    return f"runs-{list(found['cells']).index(name)}"


def endpoint_name(result: Mapping[str, Any]) -> str:
    """``pair accuracy`` of ``minimal_pairs``, in words."""
    kind = f", {result['of_kind']}" if result["of_kind"] else ""
    return f"{result['measure'].replace('_', ' ')}{kind}"


def groups(found: Found) -> list[tuple[str, list[str]]]:
    """(title, cells) of each role, in the page's order."""
    rows = [
        (title, [n for n, c in found["cells"].items() if c["role"] == role]) for role, title in ROLES.items()
    ]
    return [(title, names) for title, names in rows if names]


def _bodies(found: Found, width: int, row: Any) -> list[Markup]:
    """A body a role, a row a cell."""
    bodies = []
    for title, names in groups(found):
        head = tag("tr", tag("th", title, scope="rowgroup", colspan=width), class_="group")
        bodies.append(tag("tbody", head, *(row(name) for name in names)))
    return bodies


def _title(found: Found, name: str) -> Markup:
    cell = found["cells"][name]
    told = []
    if cell["identical_to"]:
        told.append(f"identical to {cell['identical_to']} by construction")
    elif cell["matched_to"] and cell["matched_to"] != found["baseline"]:
        told.append(f"against {cell['matched_to']}")
    if cell["placebo_of"]:
        told.append(f"placebo of {cell['placebo_of']}")
    if cell["missing"]:
        told.append(f"{len(cell['missing'])} of {len(cell['runs'])} runs missing")
    link = tag("a", breakable(name), href=f"#{slug(found, name)}")
    return tag("th", link, *(tag("small", one) for one in told), scope="row")


def main_table(found: Found) -> Markup:
    """Cells by suites, with costs; suites that cannot judge are greyed."""
    shown = [r for r in found["endpoints"].values() if not (r["role"] == "beside" and r["measure"] in PRIOR)]
    head: list[object] = ["Cell"]
    for result in shown:
        status = result["room"]["status"]
        grey = f", {GREYED[status]}" if status in GREYED else ""
        arrow = " ↓" if result["better"] < 0 else ""
        head.append(
            join(
                breakable(result["suite"]),
                tag("small", f"{endpoint_name(result)}{arrow}"),
                tag("small", f"{result['role']}{grey}"),
            )
        )
    head += [
        join("Time a step", tag("small", "of its baseline’s")),
        join("Peak memory", tag("small", "of its baseline’s")),
    ]

    def row(name: str) -> Markup:
        cells = [_result(result["cells"][name], result) for result in shown]
        costs = found["costs"].get(name, {})
        cells += [tag("td", _cost(costs.get("seconds_a_step"), 1e3, "ms"), class_="number")]
        cells += [tag("td", _cost(costs.get("peak_bytes"), 2.0**-20, "MiB"), class_="number")]
        return tag("tr", _title(found, name), *cells)

    return table(
        "Cells by suites: mean ±spread over seeds; paired difference to the baseline with its 95 % interval",
        head,
        *_bodies(found, len(head), row),
    )


def _result(row: Mapping[str, Any], result: Mapping[str, Any]) -> Markup:
    grey = result["room"]["status"] in GREYED
    gap = row["difference"]
    difference = words.difference(gap, result["unit"])
    lines = [tag("strong", words.level(row["level"], result["unit"]))]
    if difference != NOTHING:
        lines.append(tag("small", difference))
        if len(gap["seeds"]) == 1:
            lines.append(tag("small", "pictures only"))
    if row.get("verdict") is not None:
        lines.append(tag("small", words.mark(row["verdict"])))
    return tag("td", *lines, class_="number grey" if grey else "number")


def _cost(entry: Mapping[str, Any] | None, scale: float, unit: str) -> Markup:
    if entry is None or entry["value"] is None:
        return Markup(NOTHING)
    value = plain(entry["value"] * scale, 0)
    ratio = entry.get("ratio")
    told = None
    if ratio and ratio["value"] is not None:
        told = f"×{plain(ratio['value'])}"
        if ratio["low"] is not None:
            told += f" ({plain(ratio['low'])} to {plain(ratio['high'])})"
    return join(f"{value} {unit}", tag("small", told) if told else None)


def room_table(found: Found) -> Markup:
    """What each endpoint rests on, and the smallest effect that it could have found."""
    head = [
        "Endpoint",
        "Baseline",
        "Blind",
        "Room",
        "n",
        "Resampled",
        "Seeds",
        join("Smallest effect found", tag("small", "4 times in 5, by cell")),
        "Scorer",
    ]
    rows = []
    for result in found["endpoints"].values():
        level = result["cells"][found["baseline"]]["level"]
        reach = [c["detectable"]["effect"] for c in result["cells"].values() if c["detectable"]]
        room = result["room"]
        span = NOTHING
        if reach:
            low, high = plain(min(reach), 3), plain(max(reach), 3)
            span = low if low == high else f"{low} to {high}"
        cells = [
            words.level(level, result["unit"]) if level else NOTHING,
            _floor(room),
            join(GREYED.get(room["status"], "there is room"), tag("small", room["why"], class_="wrapped") if room["why"] else None),
            count(level["n"]) if level else NOTHING,
            join(count(level["pictures"]) if level else NOTHING, " ", result["resampled"]),
            str(len(level["seeds"])) if level else NOTHING,
            span,
            tag("code", result["scorer"]),
        ]  # fmt: skip
        name = join(
            breakable(result["suite"]), tag("small", endpoint_name(result)), tag("small", result["role"])
        )
        grey = "grey" if room["status"] in GREYED else None
        rows.append(
            tag(
                "tr",
                tag("th", name, scope="row"),
                *(tag("td", c, class_="number") for c in cells),
                class_=grey,
            )
        )
    return table("Endpoints: what they rest on", head, tag("tbody", *rows))


def _floor(room: Mapping[str, Any]) -> Markup | str:
    """What who does not look scores: asked with another picture, else by chance."""
    if room["blind"] is not None:
        return plain(room["blind"])
    return NOTHING if room["chance"] is None else join(plain(room["chance"]), tag("small", "chance"))


def prior_table(found: Found) -> Markup | None:
    """Accuracy where habit misleads, beside where it does not; None: no suite has priors."""
    shown = [r for r in found["endpoints"].values() if r["measure"] in PRIOR]
    if not shown:
        return None
    shown.sort(key=lambda r: (r["suite"], PRIOR.index(r["measure"])))
    head = [
        "Cell",
        *(
            join(
                r["measure"].replace("_", " ") + (" ↓" if r["better"] < 0 else ""),
                tag("small", breakable(r["suite"])),
            )
            for r in shown
        ),
    ]

    def row(name: str) -> Markup:
        return tag("tr", _title(found, name), *(_result(r["cells"][name], r) for r in shown))

    return table(
        "Questions whose habitual answer is right (aligned) or wrong (conflict)",
        head,
        *_bodies(found, len(head), row),
    )


def contribution_table(found: Found) -> Markup | None:
    """Visual Contribution beside accuracy on the same questions; None: it was not measured."""
    rows = found["contribution"]
    if not rows:
        return None
    controls = {"other": "another picture", "removed": "no picture", "grey": "a grey picture (noise)"}
    head = ["Cell", "Accuracy", *(join("VC", tag("small", f"against {controls[c]}")) for c in CONTROLS), "n"]

    def row(name: str) -> Markup:
        entry = rows.get(name)
        if entry is None:
            return tag("tr", _title(found, name), *(tag("td", NOTHING, class_="number") for _ in head[1:]))
        cells = []
        for key, unit in (("accuracy", "share"), *((f"vc/{c}", "nats") for c in CONTROLS)):
            one = entry[key]
            gap = words.difference(one.get("difference"), unit)
            cells.append(
                join(tag("strong", words.level(one, unit)), tag("small", gap) if gap != NOTHING else None)
            )
        cells.append(join(count(entry["n"] or 0), tag("small", f"{entry['pictures']} pictures")))
        return tag("tr", _title(found, name), *(tag("td", c, class_="number") for c in cells))

    return join(
        tag("p", CAUTION, " Intervals here are over seeds alone (t).", class_="about"),
        table(
            "Visual Contribution: mean ±spread over seeds, difference to the baseline",
            head,
            *_bodies(found, len(head), row),
        ),
    )


def effect_table(found: Found) -> Markup | None:
    """Main effects and interactions of the factorial; None: there is none."""
    results = [r for r in found["endpoints"].values() if r["effects"] and r["role"] != "beside"]
    if not results:
        return None
    head = [
        "Effect",
        *(
            join(breakable(r["suite"]), tag("small", endpoint_name(r) + (" ↓" if r["better"] < 0 else "")))
            for r in results
        ),
    ]
    rows = []
    for at, one in enumerate(results[0]["effects"]):
        name = " × ".join(one["factors"])
        kind = ("main effect", "beyond their sum", "beyond pairs")[len(one["factors"]) - 1]
        cells = []
        for result in results:
            told = result["effects"][at]["effect"]
            text = words.difference(told, result["unit"])
            clear = told and told.get("low") is not None and (told["low"] > 0 or told["high"] < 0)
            grey = "number grey" if result["room"]["status"] in GREYED else "number"
            cells.append(tag("td", tag("strong", text) if clear else text, class_=grey))
        rows.append(tag("tr", tag("th", name, tag("small", kind), scope="row"), *cells))
    return table(
        "Main effects and interactions, with 95 % intervals; bold: the interval excludes 0",
        head,
        tag("tbody", *rows),
    )


def details(sentences: Sequence[Markup]) -> Markup:
    """Sentences as a list."""
    return tag("ul", *(tag("li", one) for one in sentences), class_="said")
