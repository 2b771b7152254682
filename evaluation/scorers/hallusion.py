"""HallusionBench (arXiv 2310.14566): the same question about several figures, several questions about one figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .base import Measure, Scorer, share
from .groups import all_right, grouped, needed
from .yesno import gold_yes_no, read_yes_no

_SHARED = ("category", "subcategory", "set_id")


class HallusionBench(Scorer):
    """``hallusion_bench``, by rule.

    ``aAcc``: questions. ``fAcc``: figures of which all questions are right (same ``category``, ``subcategory``, ``set_id``,
    ``figure_id`` of ``meta``). ``qAcc``: questions that are right for all their figures (``question_id`` in place of
    ``figure_id``). Answers are read by ``yesno.read_yes_no``; without a reading they are wrong.

    Not comparable with published numbers, which a GPT judges: it reads prose beyond yes and no, and takes "unclear" for
    right where a question of category VS has no figure (figure 0). Those code paths, lmms-eval's included, also leave
    figure 0 of VS out of fAcc; ``fAcc`` here counts it, ``fAcc_without_VS_0`` does not.
    """

    name = "hallusion_bench"
    primary = "aAcc"

    def parse(self, record: Mapping[str, Any]) -> str | None:
        """``yes``, ``no`` or None."""
        return read_yes_no(record["output"])

    def right(self, record: Mapping[str, Any], parsed: str | None) -> bool:
        """Whether it is gold (``1`` is yes, ``0`` is no)."""
        return parsed == gold_yes_no(record)

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """As the class says."""
        figures = grouped(marked, _key("figure_id"))
        shown = [group for group in figures if not _no_figure(group[0])]
        return {
            "aAcc": share(record["right"] for record in marked),
            "fAcc": all_right(figures),
            "qAcc": all_right(grouped(marked, _key("question_id"))),
            "fAcc_without_VS_0": all_right(shown),
        }


def _key(last: str) -> Callable[[Mapping[str, Any]], tuple[str, ...]]:
    return lambda record: tuple(str(needed(record, name)) for name in (*_SHARED, last))


def _no_figure(record: Mapping[str, Any]) -> bool:
    return record["meta"]["category"] == "VS" and str(record["meta"]["figure_id"]) == "0"
