"""MMVP (arXiv 2401.06209): pairs of pictures that CLIP confuses, one question; a pair is right if both answers are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .base import Measure
from .groups import all_right, pairs
from .letters import Letter, options_of


class MMVP(Letter):
    """``mmvp``: ``pair_accuracy`` over the complete pairs of ``meta.pair``, beside ``accuracy`` of single questions.

    ``incomplete_pairs`` counts pairs whose other question is missing; they are left out. ``pair_chance`` is what guessing
    gets. Labels are the reader's: two pairs (questions 99/100 and 279/280) are labelled otherwise in the corrected files
    than in the original CSV, so scores of the two are not comparable; ``meta.labels`` says which they are.
    """

    name = "mmvp"
    primary = "pair_accuracy"

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """As the class says."""
        whole, incomplete = pairs(marked)
        n = len(whole)
        guesses = (1 / math.prod(options_of(record)[0] for record in pair) for pair in whole)
        return {
            "pair_accuracy": all_right(whole),
            "pair_chance": Measure(math.fsum(guesses) / n if n else None, n),
            "incomplete_pairs": incomplete,
            **super().measures(marked),
        }
