"""Ids of samples: each one of its own, whatever the source calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def unique(names: Sequence[str]) -> dict[int, str]:
    """New ids where a source's are missing or not unique: position -> id.

    A sample without a name (the empty one) is called by its position; to a name that came before, ``#`` and the
    position are added. A name that is there only once is kept.
    """
    given, taken, renamed = Counter(names), set[str](), dict[int, str]()
    for position, name in enumerate(names):
        new = name or str(position)
        while new in taken or (new != name and new in given):
            new += f"#{position}"
        taken.add(new)
        if new != name:
            renamed[position] = new
    return renamed
