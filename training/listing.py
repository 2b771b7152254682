"""Tables of what a YAML can name."""

from __future__ import annotations

import inspect
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from ..models.errors import UserError, nearest
from . import registry as registries


def show_algorithms(console: Console) -> None:
    """Opsin's methods with their first line, then Composer's by name."""
    table = Table(title="methods", title_justify="left", show_edge=False)
    for column in ("name", "what it does", "stages"):
        table.add_column(column)
    for name in sorted({*registries.algorithms.builtin, *registries.algorithms.added()}):
        made = registries.algorithms.get(name, name)
        table.add_row(name, first_line(made), ", ".join(getattr(made, "stages", ())) or "all")
    console.print(table)
    others = sorted(set(registries.algorithms.names()) - set(registries.algorithms.builtin))
    console.print(f"Composer's own: {', '.join(others)}")


def show_algorithm(console: Console, name: str) -> None:
    """Keywords of one method: name, default, meaning."""
    made = registries.algorithms.get(name, "opsin algorithms")
    console.print(f"[bold]{name}[/bold]: {first_line(made)}")
    meanings = argument_docs(inspect.getdoc(made) or "")
    table = Table(show_edge=False)
    for column in ("keyword", "default", "meaning"):
        table.add_column(column)
    for parameter in inspect.signature(made).parameters.values():
        default = "" if parameter.default is parameter.empty else repr(parameter.default)
        table.add_row(parameter.name, default, meanings.get(parameter.name, ""))
    console.print(table)


def show_registries(console: Console, name: str | None) -> None:
    """All registries with their entries, or one of them."""
    known = {r.name: r for r in registries.ALL}
    if name is not None and name not in known:
        raise UserError(f"opsin registry: no registry '{name}'{nearest(name, known)}")
    for registry in [known[name]] if name else registries.ALL:
        console.print(
            f"[bold]{registry.name}[/bold] (entry points: opsin_{registry.name})  {registry.description}"
        )
        console.print("  " + ", ".join(registry.names()))


def first_line(made: Any) -> str:
    """First sentence of a docstring."""
    return (inspect.getdoc(made) or "").strip().split("\n")[0]


def argument_docs(doc: str) -> dict[str, str]:
    """Meaning of each argument, from the ``Args:`` section of a docstring."""
    match = re.search(r"^Args:\n(.*?)(?:^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (match.group(1) if match else "").splitlines():
        entry = re.match(r"^ {4}(\w+(?:, \w+)*)(?: \([^)]*\))?: (.*)$", line)
        if entry:
            names = entry.group(1).split(", ")
            found.update(dict.fromkeys(names, entry.group(2)))
        elif names and line.startswith("        "):
            for name in names:
                found[name] += " " + line.strip()
    return found
