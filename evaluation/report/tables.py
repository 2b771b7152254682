"""Scores as tables: suites by group with blind rows and, where there is one, a baseline; and every measure of a suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..suites import GROUPS
from . import numbers
from .markup import Markup, breakable, join, tag

GROUP_NAMES = {
    "general": "General",
    "2d": "2D",
    "3d": "3D",
    "chart_ocr": "Charts and OCR",
    "captioning": "Captioning",
    "hallucination": "Hallucination",
    "reasoning": "Reasoning",
    "text_only": "Text only",
}
Entry = Mapping[str, Any]
"""One suite of ``scores.json``."""

UNLIKE = {"prompt_sha256": "questions", "scorer": "scorer", "mode": "way of asking"}
"""What makes two scores of a suite incomparable: key of ``scores.json`` -> its name."""


def table(caption: str, head: Sequence[object], *bodies: object) -> Markup:
    """A table with a caption, column headers and ready bodies, in a frame that scrolls where the screen is narrow.

    The first column stays in sight. The frame can be reached and scrolled with the keyboard.
    """
    row = tag(
        "tr",
        *(
            tag("th", title, scope="col", class_=None if at == 0 else "number")
            for at, title in enumerate(head)
        ),
    )
    inner = tag("table", tag("caption", caption), tag("thead", row), *bodies)
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=f"Table: {caption}")


def row(title: object, cells: Sequence[object], class_: str | None = None) -> Markup:
    """A row: a header and cells with numbers."""
    return tag(
        "tr",
        tag("th", breakable(title), scope="row"),
        *(tag("td", c, class_="number") for c in cells),
        class_=class_,
    )


def grouped(suites: Mapping[str, Entry]) -> list[tuple[str, dict[str, Entry]]]:
    """(name of a group, its suites), groups in the papers' order; those without one of our groups come last."""
    known = [(GROUP_NAMES[g], {n: e for n, e in suites.items() if e.get("group") == g}) for g in GROUPS]
    rest = {name: entry for name, entry in suites.items() if entry.get("group") not in GROUPS}
    return [(name, found) for name, found in [*known, ("Other", rest)] if found]


def primary(entry: Entry | None) -> Mapping[str, Any] | None:
    """The measure that stands for a suite."""
    return None if entry is None else entry.get("measures", {}).get(entry.get("primary"))


def blind(entry: Entry) -> Mapping[str, Any] | None:
    """The same measure with another question's pictures; None: not asked."""
    return (entry.get("blind") or {}).get("measures", {}).get(entry.get("primary"))


def unlike(new: Entry, old: Entry) -> list[str]:
    """Why two scores of a suite must not be compared; empty: nothing known speaks against it."""
    why = [name for key, name in UNLIKE.items() if new.get(key) != old.get(key)]
    a, b = primary(new), primary(old)
    if a and b and a.get("n") != b.get("n"):
        why.append("number of questions")
    return why


def score_table(suites: Mapping[str, Entry], baseline: Mapping[str, Entry] | None) -> Markup:
    """All suites, a body a group; with a baseline also the difference, absolute and relative."""
    interval = tag("small", "95 % interval")
    head: list[object] = ["Suite", join("Score", interval), "n", "Blind"]
    if baseline is not None:
        head += ["Baseline", join("Difference", interval), "Relative"]
    head += ["Unparsed", "Scorer"]
    bodies = []
    for name, found in grouped(suites):
        title = tag("tr", tag("th", name, scope="rowgroup", colspan=len(head)), class_="group")
        rows = [_suite(suite, entry, baseline) for suite, entry in found.items()]
        bodies.append(tag("tbody", title, *rows, _mean(found, baseline) if len(found) > 1 else None))
    notes = [note for name, entry in suites.items() for note in _notes(name, entry, baseline)]
    return join(
        table("Scores by group of suites", head, *bodies),
        tag("ul", *(tag("li", note) for note in notes), class_="notes") if notes else None,
    )


def _notes(name: str, entry: Entry, baseline: Mapping[str, Entry] | None) -> list[str]:
    notes = []
    why = unlike(entry, baseline[name]) if baseline is not None and name in baseline else []
    if why:
        notes.append(
            f"† {name}: the baseline has another {', another '.join(why)}; read no difference into it."
        )
    if entry.get("errors"):
        asked = entry.get("measures", {}).get("unparsed", {}).get("n")
        of = f" of {numbers.count(asked)}" if asked else ""
        notes.append(f"{name}: questions that could not be asked and count as wrong: {entry['errors']}{of}.")
    return notes


def _suite(name: str, entry: Entry, baseline: Mapping[str, Entry] | None) -> Markup:
    title = join(breakable(name), tag("small", breakable(entry.get("primary", ""))))
    old = None if baseline is None else baseline.get(name)
    cells = _cells(
        primary(entry), blind(entry), entry.get("measures", {}).get("unparsed"), entry.get("scorer", "")
    )
    if baseline is not None:
        cells[3:3] = _against(primary(entry), primary(old), _mark(entry, old))
    return row(title, cells)


def _mean(found: Mapping[str, Entry], baseline: Mapping[str, Entry] | None) -> Markup | None:
    score = numbers.mean_over([primary(entry) for entry in found.values()])
    if score is None:
        return None
    unseen = numbers.mean_over([blind(entry) for entry in found.values()])
    unparsed = numbers.mean_over([entry.get("measures", {}).get("unparsed") for entry in found.values()])
    cells = _cells(score, unseen, unparsed, "")
    if baseline is not None:
        old = numbers.mean_over([primary(baseline.get(name)) for name in found])
        marks = [_mark(entry, baseline.get(name)) for name, entry in found.items()]
        cells[3:3] = _against(score, old, next(filter(None, marks), None))
    return row(f"Mean of {len(found)} suites", cells, "mean")


def _mark(new: Entry, old: Entry | None) -> Markup | None:
    return tag("sup", "†") if old is not None and unlike(new, old) else None


def _cells(score: Any, unseen: Any, unparsed: Any, scorer: str) -> list[object]:
    return [
        join(tag("strong", numbers.with_error(score)), tag("small", numbers.interval_text(score))),
        numbers.count(score["n"]) if score else numbers.NOTHING,
        _with_n(unseen, score),
        numbers.with_error(unparsed),
        tag("code", scorer),
    ]


def _against(new: Any, old: Any, mark: Markup | None) -> list[object]:
    gap = numbers.difference(new, old)
    if gap is None:
        return [
            join(_with_n(old, new), mark if numbers.known(old) else None),
            numbers.NOTHING,
            numbers.NOTHING,
        ]
    digits = numbers.digits_of(gap["value"], gap["standard_error"], gap["unit"])
    ends = tag("small", numbers.between(numbers.difference_interval(new, old), digits, sign=True))
    return [
        join(_with_n(old, new), mark),
        join(numbers.with_error(gap, sign=True), ends),
        numbers.relative(new, old),
    ]


def _with_n(measure: Any, beside: Any) -> Markup:
    """A measure; with its n where that is another one than its neighbour's."""
    told = numbers.known(measure) and (beside is None or measure["n"] != beside["n"])
    return join(
        numbers.with_error(measure), tag("small", f"n {numbers.count(measure['n'])}") if told else None
    )


def detail_tables(name: str, entry: Entry) -> Markup:
    """Everything that is known of a suite: all measures, beside the blind ones, and all kinds."""
    unseen = (entry.get("blind") or {}).get("measures", {})
    head = ["Measure", "Value", "95 %", "n", *(["Blind", "n"] if unseen else [])]
    rows = []
    for key, measure in entry.get("measures", {}).items():
        cells = [numbers.with_error(measure), numbers.interval_text(measure), numbers.count(measure["n"])]
        if unseen:
            other = unseen.get(key)
            cells += [numbers.with_error(other), numbers.count(other["n"]) if other else numbers.NOTHING]
        rows.append(row(key, cells))
    facts = {
        "suite": entry.get("suite"), "asked to": entry.get("mode"), "scorer": entry.get("scorer"),
        "SHA-256 of the questions": entry.get("prompt_sha256"),
    }  # fmt: skip
    return join(
        table(f"{name}: all measures", head, tag("tbody", *rows)),
        _kinds(name, entry),
        tag("p", "; ".join(f"{key} {value}" for key, value in facts.items() if value), class_="facts"),
    )


def _kinds(name: str, entry: Entry) -> Markup | None:
    by_kind = entry.get("by_kind") or {}
    if not by_kind:
        return None
    first = entry.get("primary", "")
    others = sorted({key for measures in by_kind.values() for key in measures} - {first})
    head = ["Kind", first, "95 %", "n", *others]
    rows = []
    for kind, measures in by_kind.items():
        main = measures.get(first)
        cells: list[object] = [
            numbers.with_error(main), numbers.interval_text(main), numbers.count(main["n"]) if main else numbers.NOTHING,
        ]  # fmt: skip
        rows.append(row(kind, [*cells, *(_with_n(measures.get(key), main) for key in others)]))
    return table(f"{name}: by kind", head, tag("tbody", *rows))
