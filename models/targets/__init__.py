"""What methods predict of each patch: one small interface (:class:`Target`), and how one is built by name.

Each method has a table of its kinds, name -> ``module:class``, and two thin functions around :func:`check_target`
and :func:`make_target`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UserError, nearest
from ..presets import target_preset
from .base import Target
from .configured import ConfiguredTarget
from .frozen import WHERE


def make_target(spec: str | Mapping[str, Any], kinds: Mapping[str, str], where: str) -> Target:
    """Build a target from its name, or from ``{name: ..., keyword: value}``.

    Args:
        spec: name, or name and keywords.
        kinds: name -> ``module:class``.
        where: key of the configuration, or option of the command, with which messages begin.

    Raises:
        UserError: unknown name or keyword (the line names the nearest one), or the target refuses its keywords.
    """
    return build(*check_target(spec, kinds, where), where)


def check_target(
    spec: str | Mapping[str, Any], kinds: Mapping[str, str], where: str
) -> tuple[Callable[..., Target], dict[str, Any]]:
    """Class and keywords of a target, looked up but not built; see :func:`make_target`."""
    if not isinstance(spec, (str, Mapping)):
        raise UserError(f"{where}: {spec}: use a name or a mapping with a name")
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        key = where if isinstance(spec, str) else f"{where}.name"
        raise UserError(f"{key}: unknown target '{name}'{nearest(str(name), kinds)}")
    module, cls = kinds[name].split(":")
    make = getattr(importlib.import_module(module), cls)
    known = list(inspect.signature(make).parameters)
    for key in given:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key{nearest(str(key), known)}")
    return make, given


def build(make: Callable[..., Target], keywords: Mapping[str, Any], where: str) -> Target:
    """Build what :func:`check_target` looked up.

    Raises:
        UserError: as the target says it, with ``where`` in place of the word ``target`` that it begins with.
    """
    preset = target_preset(keywords.get("path"))
    if preset is not None:
        return ConfiguredTarget(preset, keywords)
    try:
        return make(**keywords)
    except UserError as error:
        said = str(error)
        if not said.startswith((f"{WHERE}.", f"{WHERE}:", f"{WHERE} ")):
            raise
        raise UserError(where + said.removeprefix(WHERE)) from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        said = (str(error).strip() or "refuses these values").splitlines()[0]
        raise UserError(f"{where}: {type(error).__name__}: {said} ({dict(keywords)})"[:300]) from error


__all__ = ["Target", "build", "check_target", "make_target"]
