"""Measures of scene captions, out of the counts of ``caption_facts.Compared``."""

from __future__ import annotations

import numpy as np

from ..scorers import Scorer
from ..scorers.captions import compared
from .measures import Form, Records


def caption_forms() -> dict[str, Form]:
    """Name of each measure of ``scene_captions`` -> its form."""

    def of(*names: str, better: int = 1, weights: tuple[float, ...] | None = (1.0,)) -> Form:
        def columns(records: Records, scorer: Scorer) -> np.ndarray:
            counts = []
            for record in records:
                one = record["compared"] if "compared" in record else compared(record)
                extra = {
                    "one": 1, "any_invented": one.invented > 0, "any_invented_shape": one.invented_shapes > 0,
                    "exact": one.exact, "signs_read": min(one.signs_right, 1) * one.hung,
                }  # fmt: skip
                counts.append([float(extra[n]) if n in extra else float(getattr(one, n)) for n in names])
            return np.array(counts, float).reshape(len(records), len(names))

        return Form(columns, weights, better=better, marked=False)

    return {
        "f1": of("right", "mentions", "found", "things", weights=None),
        "precision": of("right", "mentions"),
        "recall": of("found", "things"),
        "chair_s": of("any_invented", "one", better=-1),
        "chair_i": of("invented", "mentions", better=-1),
        "chair_s_shape": of("any_invented_shape", "one", better=-1),
        "chair_i_shape": of("invented_shapes", "shapes", better=-1),
        "relations": of("relations_right", "relations"),
        "counts": of("counts_right", "counts"),
        "signs": of("signs_right", "signs"),
        "sign_recall": of("signs_read", "hung"),
        "exact": of("exact", "one"),
    }
