"""Scorers of benchmark answers: pure functions of predictions, without torch."""

from __future__ import annotations

from collections.abc import Callable

from ...models.errors import UserError, nearest
from .base import Measure, Scorer, Scores
from .cvbench import CVBench, CVBench2D, CVBench3D
from .exact import Exact, ExactRelaxed, FirstWords
from .hallusion import HallusionBench
from .letters import Letter
from .mcq import MMBench
from .mmvp import MMVP
from .pope import Pope, PopeRead
from .ranked import RANKS
from .scenes import Scenes, ScenesFirstWords

__all__ = ["SCORERS", "Exact", "Measure", "Scorer", "Scores", "make"]

SCORERS: dict[str, Callable[..., Scorer]] = {
    one.name: one
    for one in (
        CVBench,
        CVBench2D,
        CVBench3D,
        Exact,
        ExactRelaxed,
        FirstWords,
        HallusionBench,
        Letter,
        MMBench,
        MMVP,
        Pope,
        PopeRead,
        Scenes,
        ScenesFirstWords,
    )
}
"""Name of a scorer, as in ``scores.json`` -> its constructor."""


def _scene_captions(rank: str = "sum") -> Scorer:
    from .captions import SceneCaptions  # here: it needs what draws scenes, and the others need nothing

    return SceneCaptions(rank)


SCORERS["scene_captions"] = _scene_captions


def make(name: str) -> Scorer:
    """The scorer of that name: ``letter``, ``letter@token`` (ranks by token), or ``letter/1`` as ``scores.json`` has it.

    The version is not looked at: predictions are always scored by the present one, and scores name it.

    Raises:
        UserError: there is no such scorer.
    """
    plain, _, rank = name.partition("/")[0].partition("@")
    if plain not in SCORERS or (rank and rank not in RANKS):
        known = [*SCORERS, *(f"{one}@token" for one in SCORERS)]
        raise UserError(f"scorer '{name}'{nearest(name, known if rank else SCORERS)}")
    return SCORERS[plain](rank or "sum")
