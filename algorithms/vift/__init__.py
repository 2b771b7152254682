"""ViFT: captions and text-only instructions instead of visual instructions (arXiv 2502.11427)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fusion import Fusion as Fusion
    from .steering import AbilityFusion as AbilityFusion
    from .vift import ViFT as ViFT


def __getattr__(name: str) -> Any:
    """Import the class form only when it is asked for: fusion while generating needs no Composer."""
    if name == "ViFT":
        from .vift import ViFT

        return ViFT
    if name == "Fusion":
        from .fusion import Fusion

        return Fusion
    if name == "AbilityFusion":
        from .steering import AbilityFusion

        return AbilityFusion
    raise AttributeError(name)
