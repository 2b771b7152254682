"""YAML files and ``key=value`` arguments -> one checked configuration.

Files are merged left to right, then the arguments. Every key is checked against :mod:`.schema` before
anything is built: an unknown key or a wrong type ends in one line with file, key path and the nearest name.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..models.errors import UserError, nearest
from .provenance import Path_, Provenance, find_yaml
from .schema import InitFrom, RunConfig, StageConfig

Kind = TypeVar("Kind")


@dataclass
class Loaded:
    """A checked configuration: typed, as plain data, and where each key came from."""

    run: RunConfig
    plain: dict[str, Any]
    provenance: Provenance = field(default_factory=Provenance)

    def where(self, *path: str) -> str:
        """``file:line: key.path`` of a key, for messages."""
        return f"{self.provenance.where(path)}: {'.'.join(path)}"


def load(files: Sequence[str], arguments: Sequence[str] = ()) -> Loaded:
    """Merge YAML files left to right, then ``key=value`` arguments, and check every key of a run.

    ``algorithms.X=true|false`` (and ``X: true|false`` in a later file) toggles a method and keeps the keywords
    written before; ``X: {}`` means defaults. An argument that is a key of stages goes to every stage
    (``max_duration=3ba``), except for where a run starts from.

    Raises:
        UserError: unknown key, wrong type, missing file, broken YAML or interpolation.
    """
    provenance = Provenance()
    keys = _with_init_from(merged(files, arguments, provenance, spread=_into_stages))
    return Loaded(_Checker(provenance).dataclass(RunConfig, keys, ()), keys, provenance)


def checked(kind: type[Kind], keys: Mapping[str, Any], provenance: Provenance) -> Kind:
    """Plain data as a dataclass of a schema.

    Raises:
        UserError: an unknown key or a wrong type, with the nearest right name.
    """
    return _Checker(provenance).dataclass(kind, keys, ())


def merged(
    files: Sequence[str],
    arguments: Sequence[str],
    provenance: Provenance,
    spread: Callable[[dict[str, Any], Mapping[Any, Any]], list[str]] | None = None,
) -> dict[str, Any]:
    """YAML files left to right, then ``key=value`` arguments, as plain data with interpolations resolved.

    Args:
        files: by path, or by their path inside the package's ``yamls``.
        arguments: ``key=value``.
        provenance: notes where each key was written.
        spread: gives an argument's layer to sections of the configuration too; returns the names of these stages.

    Raises:
        UserError: missing file, broken YAML, argument or interpolation, or a ``???`` that was left.
    """
    layers: dict[str, Any] = {}
    for name in files:
        _merge(layers, _read(name, provenance), ())
    for argument in arguments:
        key, separator, _ = argument.partition("=")
        if not separator or not key:
            raise UserError(f"command line: '{argument}' is no key=value")
        try:
            layer = OmegaConf.to_container(OmegaConf.from_dotlist([argument]), resolve=False)
        except Exception as error:
            raise UserError(f"command line: '{argument}': {_line(error)}") from error
        provenance.add_argument(tuple(key.split(".")), argument, layer)
        assert isinstance(layer, dict)
        _merge(layers, layer, ())
        for stage in spread(layers, layer) if spread is not None else ():
            path = ("stages", stage, *key.split("."))
            provenance.add_argument(path, argument, {"stages": {stage: layer}})
    _refuse_missing(layers, (), provenance)
    try:
        plain = OmegaConf.to_container(OmegaConf.create(layers), resolve=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:  # an interpolation, or its resolver
        key = str(getattr(error, "full_key", None) or "")
        place = f"{provenance.where(tuple(key.split('.')))}: {key}" if key else "configuration"
        raise UserError(f"{place}: {_line(error)}") from error
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def _into_stages(merged: dict[str, Any], layer: Mapping[Any, Any]) -> list[str]:
    """Give a stage's key from the command line to all stages: what one of them sets itself must not win silently."""
    shared = {k: v for k, v in layer.items() if k in STAGE_KEYS and k != "init_from"}
    stages = _mapping(merged.get("stages"))
    if not shared:
        return []
    for name in stages:
        if stages[name] is None:
            stages[name] = {}
        if isinstance(stages[name], dict):
            _merge(stages[name], shared, ())
    return list(stages)


def _with_init_from(keys: dict[str, Any]) -> dict[str, Any]:
    """``from:`` is another word for ``init_from`` (and no name that a field can have), in a run and its stages."""
    sections = [keys, *(s for s in _mapping(keys.get("stages")).values() if isinstance(s, dict))]
    for section in sections:
        if "from" in section:
            if "init_from" in section:
                raise UserError("configuration: from and init_from mean the same; give one of them")
            section["init_from"] = section.pop("from")
    return keys


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read(name: str, provenance: Provenance) -> dict[str, Any]:
    """One file as plain data, interpolations as they stand; its keys noted in ``provenance``."""
    path = find_yaml(name)
    try:
        text = path.read_text(encoding="utf-8")
        provenance.add_file(name, text)
        layer = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:  # valid YAML that is no configuration: a key twice, a list as a key
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise UserError(f"{name}{line}: {error.problem or _line(error)}") from error
    except RecursionError as error:
        raise UserError(f"{name}: nested without end (an anchor that holds itself?)") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from error
    except Exception as error:  # whatever the parsers make of it, the file is what has to be mended
        raise UserError(f"{name}: {_line(error)}") from error
    if not isinstance(layer, dict):
        raise UserError(f"{name}: a configuration is a mapping of keys, not {type(layer).__name__}")
    return {str(key): value for key, value in layer.items()}


def _refuse_missing(value: Any, path: Path_, provenance: Provenance) -> None:
    """Refuse ``???``, OmegaConf's mark of a value that is still to be given."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_missing(item, (*path, str(key)), provenance)
    elif value == "???":
        key = ".".join(path)
        raise UserError(f"{provenance.where(path)}: {key}: needs a value; give {key}=VALUE")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _merge(into: dict[str, Any], layer: Mapping[Any, Any], path: Path_) -> None:
    """Merge one layer: mappings deeply, everything else replaces; methods by their own rule."""
    for key, value in layer.items():
        key = str(key)
        if path and path[-1] == "algorithms" and _is_toggle(value):
            _toggle(into, key, value)
        elif isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, (*path, key))
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value, (*path, key))
        else:
            into[key] = value


def _is_toggle(value: Any) -> bool:
    return isinstance(value, bool) or value is None or (isinstance(value, Mapping) and not value)


def _toggle(into: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, bool):
        kept = into.get(name)
        into[name] = {**(kept if isinstance(kept, dict) else {}), "enabled": value}
    else:  # {} or nothing: the defaults
        into[name] = {"enabled": True}


INSTEAD = {
    "compile_config": "Composer compiles the whole forward pass with it, the methods' hooks too; use compile: true",
}
"""Keys that Composer or llm-foundry have and a run has not -> what to write."""


class _Checker:
    """Turns plain data into dataclasses, refusing what does not fit."""

    def __init__(self, provenance: Provenance):
        self.provenance = provenance

    def fail(self, path: Path_, message: str) -> typing.NoReturn:
        raise UserError(f"{self.provenance.where(path)}: {'.'.join(path)}: {message}")

    def dataclass(self, kind: type, value: Any, path: Path_) -> Any:
        if not isinstance(value, Mapping):
            self.fail(path, f"expected a mapping of keys, got {_shown(value)}")
        hints = get_type_hints(kind)
        for key in value:
            if key in INSTEAD and key not in hints:
                self.fail((*path, str(key)), f"not here: {INSTEAD[key]}")
            if key not in hints:
                self.fail((*path, str(key)), f"unknown key{nearest(str(key), hints)}")
        made = {key: self.value(hints[key], item, (*path, key)) for key, item in value.items()}
        return kind(**made)

    def value(self, hint: Any, value: Any, path: Path_) -> Any:
        origin = get_origin(hint)
        if hint is Any:
            return value
        if origin is Union or origin is types.UnionType:
            options = [o for o in get_args(hint) if o is not type(None)]
            if value is None and len(options) < len(get_args(hint)):
                return None
            return self.value(options[0], value, path)
        if dataclasses.is_dataclass(hint):
            if hint is InitFrom and isinstance(value, str):
                return InitFrom(path=value)
            assert isinstance(hint, type)
            return self.dataclass(hint, value, path)
        if origin is dict:
            if not isinstance(value, Mapping):
                self.fail(path, f"expected a mapping, got {_shown(value)}")
            item = get_args(hint)[1]
            return {str(k): self.value(item, v, (*path, str(k))) for k, v in value.items()}
        if origin is list:
            if isinstance(value, str) or not isinstance(value, Sequence):
                self.fail(path, f"expected a list, got {_shown(value)}")
            item = get_args(hint)[0]
            return [self.value(item, v, (*path, str(i))) for i, v in enumerate(value)]
        return self.scalar(hint, value, path)

    def scalar(self, hint: type, value: Any, path: Path_) -> Any:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if hint is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            return value
        return self.fail(path, f"expected {names.get(hint, hint.__name__)}, got {_shown(value)}")


def _shown(value: Any) -> str:
    kind = {dict: "a mapping", list: "a list", str: "text", bool: "true/false", type(None): "nothing"}
    text = f" {value!r}" if not isinstance(value, dict | list) and value is not None else ""
    return kind.get(type(value), type(value).__name__) + text[:60]


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as plain data, every default filled in."""
    return dataclasses.asdict(config)


STAGE_KEYS = tuple(f.name for f in dataclasses.fields(StageConfig))
