"""Several endpoints looked at: p-values corrected for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values (1979), in the given order: the family-wise error stays at the level.

    The i-th smallest of m is multiplied by m - i + 1, is never below the one before it and never above 1.
    """
    values = np.asarray(p, float)
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    found = np.empty_like(values)
    found[order] = np.minimum(raised, 1.0)
    return [float(value) for value in found]
