"""What ROSS reconstructs: five kinds of :class:`~opsin.models.targets.Target`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....models import targets
from ....models.targets import Target

KINDS: dict[str, str] = {
    "vae": "opsin.algorithms.ross.targets.vae:VAETarget",
    "vq": "opsin.algorithms.ross.targets.vq:VQTarget",
    "features": "opsin.models.targets.features:FeatureTarget",
    "pixels": "opsin.algorithms.ross.targets.pixels:PixelTarget",
    "autoencoder": "opsin.algorithms.ross.targets.autoencoder:AutoencoderTarget",
}
"""Name in a YAML -> module:class."""


def make_target(spec: str | Mapping[str, Any], where: str = "algorithms.ross.target") -> Target:
    """Build a target from its name, or from ``{name: ..., keyword: value}``.

    Raises:
        UserError: unknown name or keyword; the line names the nearest one.
    """
    return targets.make_target(spec, KINDS, where)


def check_target(
    spec: str | Mapping[str, Any], where: str = "algorithms.ross.target"
) -> tuple[Callable[..., Target], dict[str, Any]]:
    """Class and keywords of a target, looked up but not built; see :func:`make_target`."""
    return targets.check_target(spec, KINDS, where)


__all__ = ["KINDS", "Target", "check_target", "make_target"]
