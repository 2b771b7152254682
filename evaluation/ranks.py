"""Work dealt to all ranks, with the result that one process has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from composer.utils import dist

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_all_ranks(
    items: Sequence[Item],
    work: Callable[[list[Item]], list[Result]],
    chunk: int = 1,
    progress: Callable[[int, int], None] | None = None,
    even: bool = False,
) -> list[Result]:
    """Results of ``work`` for all items, in order, on every rank. Every rank calls this with the same items.

    Args:
        items: what there is to do.
        work: called with up to ``chunk`` neighbouring items. What lies in one call does not depend on the
            number of ranks, so that neither do results (padding of a batch, say).
        chunk: items a call.
        progress: called after each call with (calls done, calls) of this rank.
        even: all ranks make equally many calls, as a sharded model's collectives want; a rank with too few does its
            first chunk again (the first of all, if it has none) and forgets the result.
    """
    chunks = [list(items[i : i + chunk]) for i in range(0, len(items), chunk)]
    world = dist.get_world_size()
    dealt, mine = chunks[dist.get_global_rank() :: world], []
    for one in dealt:
        mine.append(work(one))
        if progress is not None:
            progress(len(mine), len(dealt))
    if even and chunks:
        for _ in range(-(-len(chunks) // world) - len(dealt)):
            work(dealt[0] if dealt else chunks[0])
    shares = dist.all_gather_object(mine)
    return [result for i in range(len(chunks)) for result in shares[i % world][i // world]]
