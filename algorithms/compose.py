"""What methods make of each other: whether a set of them is another one by construction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import VisionAlgorithm


@dataclass(frozen=True)
class Identical:
    """A set of methods gives the numbers of a smaller one, to the bit.

    Attributes:
        to: the methods that are left: those of the run that this one equals, in the order given.
        idle: method that does nothing -> why, in one sentence.
    """

    to: tuple[str, ...]
    idle: Mapping[str, str]

    @property
    def reason(self) -> str:
        """All sentences."""
        return "; ".join(self.idle.values())


def identical_by_construction(algorithms: Mapping[str, Any]) -> Identical | None:
    """Whether some of these methods do nothing beside the others, whatever the data is.

    A study skips such a cell; ``opsin train --check`` and the head of a run say so. It is read off what methods declare
    (``VisionAlgorithm.leaves_out``, ``VisionAlgorithm.lives_on``), so it holds for anybody's methods.

    Args:
        algorithms: name -> algorithm, built with its arguments. Those that are off, and Composer's own, are left aside.

    Returns:
        None: every method has something to do.
    """
    methods = {n: a for n, a in algorithms.items() if isinstance(a, VisionAlgorithm) and not a.is_off()}
    idle: dict[str, str] = {}
    for name, method in methods.items():
        for other, beside in methods.items():
            for what in beside.leaves_out.keys() & method.lives_on.keys() if other != name else ():
                idle.setdefault(
                    name,
                    f"{name} does nothing beside {other}: {beside.leaves_out[what]}, and {method.lives_on[what]}",
                )
    return Identical(tuple(n for n in algorithms if n not in idle), idle) if idle else None
