"""ROSS: reconstruct the image from what the language model saw (arXiv 2410.09575)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ross import ROSS as ROSS


def __getattr__(name: str) -> Any:
    """Import the class form only when it is asked for: the functional form needs no Composer."""
    if name == "ROSS":
        from .ross import ROSS

        return ROSS
    raise AttributeError(name)
