"""CV-Bench (arXiv 2406.16860): 2D and 3D understanding, averaged over where the pictures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.errors import UserError, nearest
from .base import Measure, mean_of, share
from .groups import needed
from .letters import Letter

SOURCES = ("ADE20K", "COCO", "Omni3D")
"""Values of ``meta.source``: the first two are 2D, the last one is 3D."""


class CVBench(Letter):
    """``cv_bench``: the benchmark's own formula, from ``meta.source``.

    ``2d`` = (``ADE20K`` + ``COCO``) / 2, ``3d`` = ``Omni3D``, ``overall`` = (``2d`` + ``3d``) / 2; a mean of which a part was
    not asked is None. ``accuracy`` is the plain mean over questions, which weighs sources by their size. Tasks are kinds.
    """

    name = "cv_bench"
    primary = "overall"

    def measures(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """As the class says."""
        sources = [_source(record) for record in marked]
        of = {
            name: share(
                record["right"] for record, source in zip(marked, sources, strict=True) if source == name
            )
            for name in SOURCES
        }
        two, three = mean_of([of["ADE20K"], of["COCO"]]), of["Omni3D"]
        return {"overall": mean_of([two, three]), "2d": two, "3d": three, **of, **super().measures(marked)}

    def measures_of_kind(self, marked: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
        """``accuracy``, ``chance`` and ``majority``: a task has a part of the sources only."""
        return super().measures(marked)


class CVBench2D(CVBench):
    """``cv_bench_2d``: the same, where only the 2D half is asked."""

    name = "cv_bench_2d"
    primary = "2d"


class CVBench3D(CVBench):
    """``cv_bench_3d``: the same, where only the 3D half is asked."""

    name = "cv_bench_3d"
    primary = "3d"


def _source(record: Mapping[str, Any]) -> str:
    source = needed(record, "source")
    if source not in SOURCES:
        where = f"suite {record.get('suite')}, {record.get('id')}"
        raise UserError(f"{where}: meta.source '{source}'{nearest(str(source), SOURCES)}")
    return source
