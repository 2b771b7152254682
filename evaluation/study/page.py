"""``report.html`` of a study: what its table says, with every interval, and what it must not be taken to say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from ..report.markup import Markup, join, tag
from ..report.numbers import count
from ..report.page import document
from ..report.wall import Pictures, Wall
from . import line_plots, tables, words
from .analyse import analysed, write_analysis
from .check_table import check_table
from .disagreement import disagreement_wall
from .folder import METHOD_ROLES, read_study
from .forest import forest, legend
from .pictures import kept_pictures, read_index
from .reading import read_runs
from .runs_table import runs_table
from .tables import GREYED, Found
from .verdicts import VERDICTS

REPORT = "report.html"
READING = (
    "± is the standard deviation over seeds. In brackets: 95 % intervals of the difference to the baseline of the same seed on the same"
    " pictures, from a bootstrap over seeds and pictures, widened for the number of seeds by Student’s t. ↓: less is better."
    " ▲ helps: better than the baseline and than every placebo. △ better: than the baseline, but no placebo was run, or it is no"
    " method. ▼ harms. ○ no evidence: the interval includes 0, or it does not beat its placebo. – not judged: the baseline is at"
    " floor or ceiling (grey), runs are missing, or the cell repeats another one by construction. Secondary endpoints are corrected"
    " by Holm within a cell; the primary endpoint is not, and cells are not corrected for one another."
)


def write_study_report(folder: Path, pictures: Pictures | None = None, wall: int = 60) -> Path:
    """Analyse a study and write ``ablation.json`` and ``report.html`` beside its ``study.json``, each whole or not at all.

    The page needs no network and may use none. Links lead to the runs' folders beside it.

    Args:
        folder: of the study.
        pictures: (suite, id) -> encoded pictures of a question; default: those that ``pictures.keep_pictures`` kept.
        wall: most questions shown with their pictures.

    Returns:
        path of the page.

    Raises:
        UserError: the study cannot be read; see ``analyse.analyse``.
    """
    folder = Path(folder)
    study = read_study(folder)
    read = read_runs(study)
    found = analysed(study, read)
    write_analysis(folder, found)
    if pictures is None:
        pictures = partial(kept_pictures, folder, read_index(folder))
    page = build(found, disagreement_wall(study, read, pictures, wall))
    path = folder / REPORT
    partial_file = path.with_name(f"{path.name}.partial")
    partial_file.write_text(page, encoding="utf-8", newline="\n")
    partial_file.replace(path)
    return path


def build(found: Found, shown: Wall | None) -> str:
    """The text of the page.

    Args:
        found: what ``ablation.json`` holds.
        shown: pictures about which cells disagree.
    """
    return document(
        found["name"],
        _facts(found),
        [part for part in _parts(found, shown) if part[2]],
        tag("p", READING),
        {"ablation": found["primary"], "cards": shown.cards if shown else []},
        (Path(__file__).parent / "study.css").read_text(encoding="utf-8"),
    )


def _facts(found: Found) -> Markup:
    runs = [run for cell in found["cells"].values() for run in cell["runs"]]
    done = sum(run["status"] in ("done", "identical") for run in runs)
    facts = {
        "Question": found["question"],
        "Primary endpoint": found["primary"],
        "Cells": count(len(found["cells"])),
        "Seeds": ", ".join(map(str, found["seeds"])),
        "Runs": f"{count(done)} of {count(len(runs))}",
        "Opsin": found["versions"]["opsin"],
    }
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts.items() if v), class_="run")


def _parts(found: Found, shown: Wall | None) -> list[tuple[str, str, list[Markup | None]]]:
    order = [n for _, names in tables.groups(found) for n in names if found["cells"][n]["matched_to"]]
    results = [r for r in found["endpoints"].values() if r["role"] != "beside"]
    forests = [one for one in (forest(result, order) for result in results) if one is not None]
    plots = _interactions(found)
    curves = [one for one in (line_plots.curve(name, found) for name in found["cells"]) if one is not None]
    effects, prior, contribution = (
        tables.effect_table(found),
        tables.prior_table(found),
        tables.contribution_table(found),
    )
    return [
        ("says", "What the table says", _says(found)),
        ("table", "Cells and suites", [tables.main_table(found)]),
        ("differences", "Differences", [legend(), tag("div", *forests, class_="plots")] if forests else []),
        ("together", "Together", [_together(found), effects, tag("div", *plots, class_="plots") if plots else None] if effects else []),
        ("habit", "Seeing against habit", [prior] if prior else []),
        ("contribution", "Visual Contribution", [contribution] if contribution else []),
        ("curves", "Learning curves", [_about_curves(), tag("div", *curves, class_="plots curves")] if curves else []),
        ("reach", "What could be seen", [tables.room_table(found)]),
        ("check", "Checked before", [check] if (check := check_table(found)) else []),
        ("runs", "Runs", [runs_table(found)]),
        ("wall", "Where cells disagree", [shown.html] if shown else []),
    ]  # fmt: skip


def _says(found: Found) -> list[Markup | None]:
    """Verdicts by the primary endpoint, then by secondary ones where there is something to say; what is lacking first."""
    primary = found["endpoints"].get(found["primary"])
    body: list[Markup | None] = [tag("p", alarm, class_="alarm", role="note") for alarm in found["alarms"]]
    if found["problems"]:
        body.append(
            tag("details", tag("summary", tag("span", "What is missing or odd"), tag("span", count(len(found["problems"])))),
                tables.details([join(one) for one in found["problems"]]), open=len(found["problems"]) <= 12)
        )  # fmt: skip
    if primary is not None:
        room = primary["room"]
        level = words.level(primary["cells"][found["baseline"]]["level"], primary["unit"])
        told = f"By the primary endpoint, {tables.endpoint_name(primary)} of {primary['suite']}, where the baseline has {level}"
        grey = f" ({GREYED[room['status']]}: {room['why']})" if room["status"] in GREYED else ""
        body.append(tag("p", f"{told}{grey}:", class_="lead"))
        body += _sentences(found, primary)
    for key in found["secondary"]:
        result = found["endpoints"].get(key)
        if result is not None:
            said = _sentences(found, result)
            told = (
                tag("span", f"{tables.endpoint_name(result)} of {result['suite']} (secondary)"),
                tag("span", _counts(found, result), class_="counts"),
            )
            body.append(tag("details", tag("summary", *told), *said))
    return body


def _sentences(found: Found, result: Mapping[str, Any]) -> list[Markup]:
    """What is said of methods; folded up, of everything else."""
    rows = [(n, result["cells"][n]) for _, names in tables.groups(found) for n in names]
    rows = [(name, row) for name, row in rows if row["verdict"] is not None]
    methods = [(name, row) for name, row in rows if found["cells"][name]["role"] in METHOD_ROLES]
    others = [one for one in rows if one not in methods]
    body = [tables.details([words.sentence(name, row, result) for name, row in methods])] if methods else []
    if others:
        head = tag("summary", tag("span", "Controls, placebos"), tag("span", count(len(others))))
        body.append(
            tag("details", head, tables.details([words.sentence(n, row, result) for n, row in others]))
        )
    return body


def _counts(found: Found, result: Mapping[str, Any]) -> str:
    """``helps: 2, harms: 1``, of methods."""
    roles = {name: cell["role"] for name, cell in found["cells"].items()}
    said = [
        row["verdict"]["word"]
        for n, row in result["cells"].items()
        if row["verdict"] and roles[n] in METHOD_ROLES
    ]
    return ", ".join(f"{told}: {said.count(word)}" for word, told in VERDICTS.items() if word in said)


def _together(found: Found) -> Markup:
    primary = found["endpoints"].get(found["primary"])
    told = [tag("p", "A main effect is what a method gives on average over all settings of the others; an interaction, what two (three)"
            " give together beyond the sum of what each gives.", class_="about")]  # fmt: skip
    for one in primary["effects"] if primary else ():
        effect = one["effect"]
        if len(one["factors"]) != 2 or not effect or effect.get("low") is None:
            continue
        a, b = one["factors"]
        sign = (effect["low"] > 0) - (effect["high"] < 0)
        said = {1: "more than", -1: "less than", 0: "neither clearly more nor clearly less than"}[sign]
        told.append(
            tag(
                "p",
                f"{a} and {b} together give {said} the sum of both: {words.difference(effect, primary['unit'])}.",
            )
        )
    return join(*told)


def _interactions(found: Found) -> list[Markup]:
    primary = found["endpoints"].get(found["primary"])
    if primary is None or not primary["effects"]:
        return []
    plots = [line_plots.interaction(primary, found, a, b) for a, b in combinations(found["factors"], 2)]
    return [one for one in plots if one is not None]


def _about_curves() -> Markup:
    return tag(
        "p", "Language-model loss on training batches, mean over seeds with the least and the greatest of them; grey: its baseline."
        " Methods change which tokens are labelled, so curves of unlike methods need not be comparable.", class_="about",
    )  # fmt: skip
