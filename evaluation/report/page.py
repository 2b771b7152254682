"""The page as a whole: parts put into its template, and a policy that forbids it everything it does not bring along."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from ...models.errors import UserError
from . import numbers
from .analyses import Analysis, section
from .markup import Markup, data_block, join, tag
from .plots import Point, legend, plot, suite_points
from .tables import Entry, blind, detail_tables, grouped, primary, score_table
from .wall import Pictures, Wall, wall

HERE = Path(__file__).parent
VERSIONS = {"opsin": "Opsin", "torch": "PyTorch", "transformers": "Transformers"}
READING = (
    "Every number stands with its standard error (±), its 95 % interval (Wilson’s for shares of questions, else 1.96 standard"
    " errors) and n, what it is a mean over. Blind: the same measure, every question asked with another one’s picture."
    " Unparsed: share of answers in which the scorer could read none; they count as wrong."
)
AGAINST = (
    " Differences are this model minus the baseline; their intervals take the two for independent, which is on the safe side"
    " where both answered the same questions."
)


def write_report(
    path: Path,
    scores: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    pictures: Pictures,
    *,
    title: str,
    wall: int = 200,
    baseline: Mapping[str, Any] | None = None,
    analyses: Sequence[Analysis] = (),
) -> None:
    """Write ``report.html``, whole or not at all; the same arguments give the same bytes.

    The page needs no network and may use none: its policy allows its own style and script (by hash) and pictures that
    it carries. Nothing of a user's becomes markup.

    Args:
        path: file to write; its folder is made.
        scores: what ``scores.json`` holds.
        predictions: marked predictions (``parsed`` and ``right``; ``right`` None where the scorer judges no single answer).
        pictures: (suite, id) -> encoded pictures of a question, called for those on the wall only.
        title: heading.
        wall: most predictions shown with their pictures.
        baseline: another ``scores.json`` that these scores are held against.
        analyses: (name, numbers, PNG or None).

    Raises:
        UserError: no scores, predictions that are not marked, or a wall of less than nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = build(
        scores, predictions, pictures, title=title, wall_size=wall, baseline=baseline, analyses=analyses
    )
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, encoding="utf-8", newline="\n")
    partial.replace(path)


def build(
    scores: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    pictures: Pictures,
    *,
    title: str,
    wall_size: int,
    baseline: Mapping[str, Any] | None,
    analyses: Sequence[Analysis],
) -> str:
    """The text of the page; see :func:`write_report`."""
    suites = _suites(scores, "scores")
    old = None if baseline is None else _suites(baseline, "baseline")
    if wall_size < 0:
        raise UserError(f"report: a wall of {wall_size} pictures; use 0 or more")
    shown = wall(predictions, pictures, wall_size, list(suites)) if wall_size and predictions else None
    parts = _parts(scores, suites, old, baseline, analyses, shown)
    told = {key: value for key, value in scores.items() if key != "analyses"}  # their lists may be long
    return document(
        title,
        _run(scores, suites),
        parts,
        tag("p", READING, AGAINST if old is not None else None),
        {"scores": told, "cards": shown.cards if shown else []},
    )


def document(
    title: str,
    facts: Markup,
    parts: Sequence[tuple[str, str, Sequence[Markup | None]]],
    foot: Markup,
    data: Mapping[str, Any],
    style: str = "",
) -> str:
    """A page of its own that may load nothing.

    Args:
        title: heading.
        facts: below it.
        parts: (anchor, heading, content).
        foot: at its end.
        data: what its script reads: ``cards``, see ``wall.Wall``; and whatever readers of the page may want.
        style: added to ``report.css``.
    """
    links = [tag("li", tag("a", heading, href=f"#{key}")) for key, heading, _ in parts]
    style, script = _asset("report.css") + style, _asset("report.js")
    return Template(_asset("page.html")).substitute(
        title=join(title),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        head=join(
            tag("h1", title),
            facts,
            tag("nav", tag("ul", *links), aria_label="Parts of this page"),
        ),
        main=join(*(tag("section", tag("h2", heading), *body, id=key) for key, heading, body in parts)),
        foot=foot,
        data=data_block("report", data),
    )


def _parts(
    scores: Mapping[str, Any],
    suites: Mapping[str, Entry],
    old: Mapping[str, Entry] | None,
    baseline: Mapping[str, Any] | None,
    analyses: Sequence[Analysis],
    shown: Wall | None,
) -> list[tuple[str, str, list[Markup | None]]]:
    """(anchor, heading, content) of the parts that there are."""
    parts: list[tuple[str, str, list[Markup | None]]] = []
    if suites:
        beside = tag("p", f"Baseline: {_of(baseline)}", class_="about") if baseline is not None else None
        parts.append(("scores", "Scores", [beside, score_table(suites, old)]))
        parts.append(("plots", "Suites and kinds", [_plots(suites)]))
        parts.append(("measures", "Every measure", [_details(name, entry) for name, entry in suites.items()]))
    found = [section(analysis) for analysis in analyses]
    if isinstance(scores.get("lmms"), Mapping):
        found.append(section(("lmms-eval", scores["lmms"], None)))
    if found:
        parts.append(("analyses", "Analyses", [*found]))
    if shown is not None:
        parts.append(("wall", "Pictures, questions, answers", [shown.html]))
    return parts


def _plots(suites: Mapping[str, Entry]) -> Markup:
    """One plot of all suites whose score is a share, where there are several; then one for each suite that has kinds."""
    whole = [
        Point(name, primary(entry) or {}, blind(entry), entry.get("measures", {}).get("chance"))
        for _, found in grouped(suites)
        for name, entry in found.items()
        if numbers.known(primary(entry)) and (primary(entry) or {}).get("unit", "share") == "share"
    ]
    figures, shown = [], list(whole)
    if len(whole) > 1:
        figures.append(_figure("All suites", "each by its own measure", whole))
    for name, entry in suites.items():
        points = suite_points(entry)
        if points and (len(points) > 1 or len(whole) < 2):
            figures.append(_figure(name, str(entry.get("primary", "")), points))
            shown += points
    return join(legend(shown), tag("div", *figures, class_="plots"))


def _figure(name: str, what: str, points: Sequence[Point]) -> Markup:
    return tag("figure", tag("figcaption", tag("h3", name), tag("small", what)), plot(points))


def _details(name: str, entry: Entry) -> Markup:
    score = primary(entry)
    told = f"{numbers.with_error(score)}, n {numbers.count(score['n'])}" if score else numbers.NOTHING
    return tag("details", tag("summary", tag("span", name), tag("span", told)), detail_tables(name, entry))


def _run(scores: Mapping[str, Any], suites: Mapping[str, Entry]) -> Markup:
    asked = sum(int(entry.get("measures", {}).get("unparsed", {}).get("n") or 0) for entry in suites.values())
    facts = {
        "Model": scores.get("model", scores.get("predictions")),
        "Date": str(scores.get("created", "")).replace("T", " ").replace("Z", " UTC"),
        **{name: scores.get(key) for key, name in VERSIONS.items()},
        "Suites": numbers.count(len(suites)),
        "Questions": numbers.count(asked),
    }
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in facts.items() if v), class_="run")


def _of(scores: Mapping[str, Any] | None) -> str:
    found = scores or {}
    parts = [
        found.get("model"),
        str(found.get("created", "")).partition("T")[0],
        found.get("opsin") and f"Opsin {found['opsin']}",
    ]
    return ", ".join(str(part) for part in parts if part) or "unnamed"


def _suites(scores: Mapping[str, Any], what: str) -> Mapping[str, Entry]:
    suites = scores.get("suites")
    if not isinstance(suites, Mapping):
        raise UserError(f"report: {what}: no scores of opsin eval (there is no 'suites' in it)")
    return suites


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """Of an inline style or script, as a Content-Security-Policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
