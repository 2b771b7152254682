"""What JARVIS predicts of each patch: features of a frozen vision model, or of a tower that lies here.

Defaults are the reference's: DINOv2-L, its output behind the final norm as it is, moved to the model's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...models import targets
from ...models.targets import Target

KINDS: dict[str, str] = {
    "features": "opsin.models.targets.features:FeatureTarget",
    "tower": "opsin.models.targets.tower:TowerTarget",
}
"""Name in a YAML -> module:class."""

DINOV2 = "facebook/dinov2-large"
"""The network of ``features`` where neither ``path`` nor ``timm`` is given: the reference's."""

DEFAULTS: dict[str, Any] = {"layer": "last", "normalise": "none", "resize": "features"}
"""Keywords of both kinds that differ from the kinds' own defaults."""


def make_target(spec: str | Mapping[str, Any], where: str = "algorithms.jarvis.target") -> Target:
    """Build a target from its name, or from ``{name: ..., keyword: value}``.

    Raises:
        UserError: unknown name or keyword (the line names the nearest one), or the target refuses its keywords.
    """
    return targets.build(*check_target(spec, where), where)


def check_target(
    spec: str | Mapping[str, Any], where: str = "algorithms.jarvis.target"
) -> tuple[Callable[..., Target], dict[str, Any]]:
    """Class and keywords of a target with JARVIS's defaults, looked up but not built; see :func:`make_target`."""
    make, given = targets.check_target(spec, KINDS, where)
    name = spec if isinstance(spec, str) else spec["name"]
    if name == "features" and given.get("path") is None and given.get("timm") is None:
        given["path"] = DINOV2
    return make, {**DEFAULTS, **given}


__all__ = ["DEFAULTS", "DINOV2", "KINDS", "Target", "check_target", "make_target"]
