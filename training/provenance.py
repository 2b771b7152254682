"""Where each key of a configuration was written, so that a message can point at the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..models.errors import UserError, nearest

Path_ = tuple[str, ...]


class Provenance:
    """Key path -> the file and line (or command-line argument) that set it last."""

    def __init__(self) -> None:
        self._places: dict[Path_, str] = {}

    def add_file(self, name: str, text: str) -> None:
        """Note every key of a YAML document.

        Raises:
            UserError: the text is no YAML; the line names file and line.
        """
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise UserError(f"{name}{line}: not valid YAML: {problem}") from error
        if root is not None:
            self._walk(root, (), name)

    def add_argument(self, path: Path_, argument: str, layer: Any = None) -> None:
        """Note a ``key=value`` argument, and the keys inside its value (``layer``: the whole as nested data)."""
        place = f"command line ({argument})"
        self._places[path] = place
        for key in path:
            layer = layer.get(key) if isinstance(layer, dict) else None
        self._note(layer, path, place)

    def where(self, path: Path_) -> str:
        """Place of a key, or of the nearest enclosing one."""
        return self._places.get(path[: self.depth(path)], "configuration")

    def depth(self, path: Path_) -> int:
        """How much of a key path was written anywhere: the length of the nearest enclosing key."""
        return next((n for n in range(len(path), 0, -1) if path[:n] in self._places), 0)

    def where_in_stage(self, section: Path_, key: Path_) -> str:
        """``place: key.path`` of a stage's key: in its own section, or among the run's defaults for all stages.

        Where both were written the deeper one is meant: ``optimizer.lr=0`` of the command line also reaches a
        stage that has an ``optimizer:`` with other keys.
        """
        own = (*section, *key)
        path = own if self.depth(own) - len(section) >= max(self.depth(key), 1) else key
        if self.where(own) == self.where(key) and self.where(key).startswith("command line"):
            path = key  # as it was typed: an argument goes to all stages
        return f"{self.where(path)}: {'.'.join(path)}"

    def _note(self, value: Any, path: Path_, place: str) -> None:
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                self._places[(*path, str(key))] = place
                self._note(item, (*path, str(key)), place)

    def _walk(self, node: yaml.Node, path: Path_, name: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*path, str(key.value))
                self._places[here] = f"{name}:{key.start_mark.line + 1}"
                self._walk(value, here, name)
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                here = (*path, str(i))
                self._places[here] = f"{name}:{value.start_mark.line + 1}"
                self._walk(value, here, name)


def find_yaml(name: str) -> Path:
    """A YAML by path; failing that, by its path inside the package's ``yamls`` folder.

    Raises:
        UserError: there is none; the line names the nearest one.
    """
    given = Path(name)
    if given.is_file():
        return given
    shipped = Path(__file__).resolve().parent.parent / "yamls"
    inside = name.removeprefix("yamls/")
    for candidate in (shipped / inside, shipped / f"{inside}.yaml"):
        if candidate.is_file():
            return candidate
    if given.is_dir():
        raise UserError(f"{name}: a folder; give a YAML file")
    known = [str(p.relative_to(shipped)) for p in shipped.rglob("*.yaml")]
    raise UserError(f"{name}: no such file{nearest(inside, known)}")
