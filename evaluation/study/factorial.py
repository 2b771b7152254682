"""Main effects and interactions of a complete factorial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from .folder import Study

MOST = 3
"""Highest order of an interaction that is looked at."""


def settings(study: Study) -> dict[frozenset[str], str]:
    """Set of factors that are on -> the cell that has just them: the baseline and cells of role ``factorial``."""
    return settings_of(
        {n: {"role": c.role, "methods": c.methods} for n, c in study.cells.items()}, study.baseline
    )


def settings_of(cells: Mapping[str, Mapping[str, Any]], baseline: str) -> dict[frozenset[str], str]:
    """The same of cells as ``ablation.json`` has them."""
    names = [baseline, *(name for name, cell in cells.items() if cell["role"] == "factorial")]
    return {frozenset(cells[name]["methods"]): name for name in names}


def lacking(study: Study) -> list[str]:
    """Settings of the factorial without a cell, in words; empty: it is complete."""
    known = settings(study)
    wanted = [frozenset(c) for r in range(len(study.factors) + 1) for c in combinations(study.factors, r)]
    return ["+".join(f for f in study.factors if f in one) or "nothing" for one in wanted if one not in known]


def effects(factors: Sequence[str]) -> list[tuple[str, ...]]:
    """Main effects, then interactions of two and of three factors."""
    return [one for order in range(1, min(MOST, len(factors)) + 1) for one in combinations(factors, order)]


def contrast(
    factors: Sequence[str], effect: Sequence[str], cells: Mapping[frozenset[str], str]
) -> dict[str, float]:
    """Weights of the cells in an effect.

    A main effect is the difference that its factor makes, averaged over all settings of the others. The interaction of two is
    the difference of differences, ``y(AB) - y(A) - y(B) + y()``, averaged likewise: what both give beyond the sum of what
    each gives. That of three is the same of an interaction of two. These are the coefficients of an ordinary regression
    with factors coded -1/2 and +1/2.
    """
    share = 2.0 ** -(len(factors) - len(effect))
    return {
        cells[frozenset(on)]: share * math.prod(1 if factor in on else -1 for factor in effect)
        for order in range(len(factors) + 1)
        for on in combinations(factors, order)
    }
