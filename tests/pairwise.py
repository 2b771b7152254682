"""Few combinations of settings in which every two values of two factors meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def pairs_of(case: Mapping[str, Any]) -> set[tuple[str, Any, str, Any]]:
    return {(a, case[a], b, case[b]) for a, b in combinations(case, 2)}


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Greedy cover: each case takes the first pair that is missing, then for every other factor what covers most."""
    missing = [
        (a, x, b, y) for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]
    ]  # fmt: skip
    left, cases = dict.fromkeys(missing), []
    while left:
        a, x, b, y = next(iter(left))
        chosen: dict[str, Any] = {a: x, b: y}
        for name in factors:
            if name not in chosen:
                # Of values that cover as much, another one in each case.
                turn = len(cases) % len(factors[name])
                values = [*factors[name][turn:], *factors[name][:turn]]
                now = dict(chosen)
                chosen[name] = max(values, key=lambda v: sum(_pair(factors, n, w, name, v) in left for n, w in now.items()))  # fmt: skip
        case = {name: chosen[name] for name in factors}
        for pair in pairs_of(case):
            left.pop(pair, None)
        cases.append(case)
    return cases


def _pair(factors: Mapping[str, Any], a: str, x: Any, b: str, y: Any) -> tuple[str, Any, str, Any]:
    order = list(factors)
    return (a, x, b, y) if order.index(a) < order.index(b) else (b, y, a, x)
