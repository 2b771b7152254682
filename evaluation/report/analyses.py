"""Analyses on the page: their numbers as tables, whatever their form, and their picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import numbers
from .markup import Markup, join, tag
from .tables import row, table
from .thumbnails import png_uri

Analysis = tuple[str, Mapping[str, Any], "bytes | None"]
"""Name, numbers (JSON), and a PNG or None."""

MEASURE = ("value", "n", "standard_error", "unit")
"""Keys of ``Measure.as_dict``."""

LONGEST = 16
"""Rows of a table that are not folded up; and numbers of a list that are printed one by one."""

ERRORS = {"_standard_error": 1.0, "_95": 1 / numbers.Z}
"""Key of an error beside ``key`` -> its share in standard errors (``_95``: half of a 95 % interval)."""

CAUTION = (
    "Visual Contribution says how much likelier the right answer becomes through the picture, not whether it is given: it was"
    " seen to fall while accuracy rose. It stands beside accuracy and ranks no model."
)

ALONE = " Accuracy on these questions was not measured here: see the scores above before reading anything into it."


def section(analysis: Analysis) -> Markup:
    """One analysis."""
    title, found, png = analysis
    picture = None
    if png is not None:
        picture = tag(
            "figure",
            tag(
                "img", src=png_uri(png), alt=f"Picture of the analysis {title}; its numbers are in the tables"
            ),
        )
    caution, keys = None, f" {title} {_keys(found)}"
    if "contribution" in keys or " vc/" in keys:
        caution = tag("p", CAUTION, None if "accuracy" in keys else ALONE, class_="about")
    body = tag("div", tag("div", *tables(title, found)), picture, class_="beside")
    return tag("section", tag("h3", title), caution, body, class_="analysis")


def tables(caption: str, found: Mapping[str, Any], first: str = "Row") -> Iterable[Markup]:
    """Tables of a nested mapping: numbers of one level together, mappings and curves alike as one table each.

    Args:
        caption: of the tables.
        found: numbers, measures, lists and further mappings.
        first: header of the first column where ``found`` becomes rows.
    """
    found = {key: _parted(value) for key, value in found.items() if value not in ({}, [])}
    if _curves(found):  # name -> a measure a place (a layer): a row a place
        places = len(next(iter(found.values())))
        yield matrix(
            caption, {str(at + 1): {k: v[at] for k, v in found.items()} for at in range(places)}, first
        )
        return
    if _crossed(found):  # ``accuracy/image``, ``nats/image`` ...: a row a case
        yield matrix(caption, _by_case(found), "Case")
        return
    branches = {key: _rows(value, key) for key, value in found.items() if not _leaf(value)}
    if len(branches) == len(found) > 0 and all(_flat(value) for value, _ in branches.values()):
        rows = {key: value for key, (value, _) in branches.items()}
        if all(map(_crossed, rows.values())):  # numbers that belong together side by side, not a screen apart
            split = {
                f"{key}, {c}": cells for key, value in rows.items() for c, cells in _by_case(value).items()
            }
            rows, first = split, f"{first}, case"
        yield matrix(caption, rows, first)
        return
    leaves = _with_errors({key: value for key, value in found.items() if key not in branches})
    if "measures" in branches and _flat(branches["measures"][0]) and not _crossed(branches["measures"][0]):
        leaves.update(branches.pop("measures")[0])
    measured = [key for key in _accuracy_first(leaves) if _measure(leaves[key])]
    facts = [f"{_words(key)}: {_said(value)}" for key, value in leaves.items() if key not in measured]
    if facts:
        yield tag("p", "; ".join(facts), class_="facts")
    if measured:
        body = [row(_words(key), _cells(leaves[key])) for key in measured]
        yield table(caption, ["Number", "Value", "95 %", "n"], tag("tbody", *body))
    for key, (value, header) in branches.items():
        yield from tables(f"{caption}: {_words(key)}", value, header)


def matrix(caption: str, rows: Mapping[str, Mapping[str, Any]], first: str) -> Markup:
    """A row a mapping, a column a key, folded up where it is long; never sorted by a value."""
    cleaned = {key: _with_errors(value) for key, value in rows.items()}
    keys = _accuracy_first({key: None for value in cleaned.values() for key in value})
    counts = [{cell["n"] for cell in value.values() if _measure(cell)} for value in cleaned.values()]
    once = any(counts) and all(
        len(found) < 2 for found in counts
    )  # one n a row: a column, else one in each cell
    body = []
    for (key, value), found in zip(cleaned.items(), counts, strict=True):
        cells: list[object] = [_matrix_cell(value.get(k), not once) for k in keys]
        if once:
            cells.append(_said(next(iter(found), None)))
        body.append(row(_words(key), cells))
    head = [first, *map(_words, keys), *(["n"] if once else [])]
    whole = table(caption, head, tag("tbody", *body))
    if len(rows) <= LONGEST:
        return whole
    told = f"{numbers.count(len(rows))} rows"
    return tag("details", tag("summary", tag("span", caption), tag("span", told)), whole)


def _parted(value: Any) -> Any:
    """A measure that is mixed with other facts as one fact of them."""
    if isinstance(value, list | tuple):
        return [_parted(inner) for inner in value]
    if not isinstance(value, Mapping) or _measure(value) or not {"value", "n"} <= set(value):
        return value
    others = {key: inner for key, inner in value.items() if key not in MEASURE}
    return {"value": {key: value.get(key) for key in MEASURE}, **others}


def _rows(value: Any, key: str) -> tuple[Mapping[str, Any], str]:
    """A mapping as it is, a list of them by the words in them, else by their places; and what its rows are."""
    if isinstance(value, Mapping):
        return value, _words(key.removeprefix("by_")).capitalize()
    if all(isinstance(inner, Mapping) for inner in value):
        words = [k for k in value[0] if all(isinstance(inner.get(k), str) for inner in value)]
        named = {
            ", ".join(inner[k] for k in words): {k: v for k, v in inner.items() if k not in words}
            for inner in value
        }
        if words and len(named) == len(value):
            return named, ", ".join(map(_words, words)).capitalize()
    return {str(at + 1): inner for at, inner in enumerate(value)}, "Row"


def _crossed(found: Mapping[str, Any]) -> bool:
    """Whether all keys are ``WHAT/CASE``, of several of both."""
    if not all(key.count("/") == 1 and _leaf(value) for key, value in found.items()):
        return False
    return all(len({key.split("/")[part] for key in found}) > 1 for part in (0, 1))


def _by_case(found: Mapping[str, Any]) -> Mapping[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        what, case = key.split("/")
        rows.setdefault(case, {})[what] = value
    return rows


def _flat(value: Mapping[str, Any]) -> bool:
    return all(map(_leaf, value.values()))


def _curves(found: Mapping[str, Any]) -> bool:
    lists = [
        value
        for value in found.values()
        if isinstance(value, list | tuple) and value and all(map(_measure, value))
    ]
    return len(lists) == len(found) > 0 and len({len(value) for value in lists}) == 1


def _measure(value: Any) -> bool:
    return isinstance(value, Mapping) and {"value", "n"} <= set(value) <= set(MEASURE)


def _leaf(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return not any(isinstance(inner, Mapping | list | tuple) for inner in value)
    return _measure(value) or not isinstance(value, Mapping)


def _with_errors(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Errors that stand under a key of their own put where they belong."""
    found = dict(leaves)
    for key, value in leaves.items():
        for ending, scale in ERRORS.items():
            error = leaves.get(f"{key}{ending}")
            if isinstance(value, int | float) and isinstance(error, int | float):
                n = leaves.get(f"{key}_n", leaves.get(f"n_{key}", leaves.get("n")))
                found[key] = {"value": value, "n": n, "standard_error": error * scale, "unit": "number"}
                for used in (f"{key}{ending}", f"{key}_n", f"n_{key}", "n"):
                    found.pop(used, None)
    return found


def _accuracy_first(keys: Iterable[str]) -> list[str]:
    return sorted(
        keys, key=lambda key: not key.startswith("accuracy")
    )  # stable: the others stay where they were


def _cells(measure: Mapping[str, Any]) -> Sequence[str]:
    return [numbers.with_error(measure), numbers.interval_text(measure), _said(measure["n"])]


def _matrix_cell(value: Any, tell_n: bool) -> Markup:
    if not _measure(value):
        return join(_said(value))
    told = tag("small", f"n {_said(value['n'])}") if tell_n and value["n"] is not None else None
    return join(numbers.with_error(value), told)


def _said(value: Any) -> str:
    if value is None:
        return numbers.NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return numbers.count(value)
    if isinstance(value, float):
        return numbers.plain(value, 1 if abs(value) >= 100 else 3)
    if isinstance(value, list | tuple):
        shown = ", ".join(_said(inner) for inner in value[:LONGEST])
        return shown if len(value) <= LONGEST else f"{shown} … ({len(value)} in all)"
    return str(value)


def _words(key: str) -> str:
    return str(key).replace("_", " ")


def _keys(found: Any) -> str:
    if isinstance(found, Mapping):
        return " ".join(f"{key} {_keys(value)}" for key, value in found.items())
    return ""
