"""Where each key of a configuration was written, so that a message can point at the line."""

from __future__ import annotations

from pathlib import Path

import yaml

from ..models.errors import UserError

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

    def add_argument(self, path: Path_, argument: str) -> None:
        """Note a ``key=value`` argument."""
        self._places[path] = f"command line ({argument})"

    def where(self, path: Path_) -> str:
        """Place of a key, or of the nearest enclosing one."""
        while path:
            if path in self._places:
                return self._places[path]
            path = path[:-1]
        return "configuration"

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
    from ..models.errors import nearest

    known = [str(p.relative_to(shipped)) for p in shipped.rglob("*.yaml")]
    raise UserError(f"{name}: no such file{nearest(inside, known)}")
