"""L2T: learn to predict the instruction too (arXiv 2503.22215)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .l2t import L2T as L2T


def __getattr__(name: str) -> Any:
    """Import the class form only when it is asked for: the functional form needs no Composer."""
    if name == "L2T":
        from .l2t import L2T

        return L2T
    raise AttributeError(name)
