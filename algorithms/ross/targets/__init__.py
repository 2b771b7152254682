"""What ROSS reconstructs: one small interface (:class:`Target`), five kinds."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from ....models.errors import UserError, nearest
from .base import Target

KINDS: dict[str, str] = {
    "vae": "vae:VAETarget",
    "vq": "vq:VQTarget",
    "features": "features:FeatureTarget",
    "pixels": "pixels:PixelTarget",
    "autoencoder": "autoencoder:AutoencoderTarget",
}
"""Name in a YAML -> module:class."""


def make_target(spec: str | Mapping[str, Any], where: str = "algorithms.ross.target") -> Target:
    """Build a target from its name, or from ``{name: ..., keyword: value}``.

    Raises:
        UserError: unknown name or keyword; the line names the nearest one.
    """
    make, keywords = check_target(spec, where)
    try:
        return make(**keywords)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        said = (str(error).strip() or "refuses these values").splitlines()[0]
        raise UserError(f"{where}: {type(error).__name__}: {said} ({keywords})"[:300]) from error


def check_target(
    spec: str | Mapping[str, Any], where: str = "algorithms.ross.target"
) -> tuple[type[Target], dict[str, Any]]:
    """Class and keywords of a target, looked up but not built; see :func:`make_target`."""
    if not isinstance(spec, (str, Mapping)):
        raise UserError(f"{where}: {spec}: use a name or a mapping with a name")
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = given.pop("name", None)
    if not isinstance(name, str) or name not in KINDS:
        key = where if isinstance(spec, str) else f"{where}.name"
        raise UserError(f"{key}: unknown target '{name}'{nearest(str(name), KINDS)}")
    module, cls = KINDS[name].split(":")
    make = getattr(importlib.import_module(f".{module}", __name__), cls)
    known = list(inspect.signature(make).parameters)
    for key in given:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key{nearest(str(key), known)}")
    return make, given


__all__ = ["KINDS", "Target", "check_target", "make_target"]
