"""What the report of a study costs: statistics of a study of full size, and reading predictions.

CPU seconds of one thread, as the analysis runs on one: levels and two differences of every cell for each endpoint, with
bootstrap; and ``reading.read_runs`` over runs of scenes, for each prediction.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import report

from opsin.evaluation.benchmarks.own_scenes import scenes
from opsin.evaluation.records import prediction, write_predictions
from opsin.evaluation.scorers import make
from opsin.evaluation.study.folder import read_study
from opsin.evaluation.study.measures import form
from opsin.evaluation.study.reading import read_runs
from opsin.evaluation.study.resampled import Outcomes, Resampled

NAME = "study_speed"
CELLS, SEEDS, PICTURES, ENDPOINTS = 100, 6, 4000, 8


def statistics() -> float:
    """CPU seconds of all estimates of a made-up study."""
    rng, shape = np.random.default_rng(0), form(make("scenes"), "accuracy")
    runs = {(f"c{c:03d}", s): c * SEEDS + s for c in range(CELLS) for s in range(SEEDS)}
    spent = 0.0
    for _ in range(ENDPOINTS):
        right = (rng.random((len(runs), PICTURES)) < 0.6).astype(float)
        sums = np.stack([right, np.ones_like(right)], -1)
        begun = time.process_time()
        found = Resampled(Outcomes(shape, runs, sums))
        for c in range(CELLS):
            found.level(f"c{c:03d}")
            for other in (0, 1):
                if c > other:
                    found.difference(f"c{c:03d}", f"c{other:03d}")
        spent += time.process_time() - begun
    return spent


def reading(samples: int, runs: int) -> tuple[float, int]:
    """CPU seconds of reading some runs, and how many predictions they have."""
    rng = np.random.default_rng(0)
    suites = {
        "conflict": scenes(split=["aligned", "conflict"], samples=samples, objects=[2, 2], charts=0, sign=0),
        "minimal_pairs": scenes(split="minimal_pairs", samples=samples, objects=[2, 2], charts=0, sign=0),
    }
    items = {name: suite.load() for name, suite in suites.items()}
    with tempfile.TemporaryDirectory() as place:
        cells = []
        for seed in range(runs):
            folder = Path(place) / f"cells/baseline-{seed}"
            folder.mkdir(parents=True)
            records, scores = [], {}
            for name, asked in items.items():
                said = [i.gold if rng.random() < 0.6 else (i.choices or ("no",))[-1] for i in asked]
                found = [prediction(name, i, s, scorer="scenes") for i, s in zip(asked, said, strict=True)]
                marked, score = make("scenes").score(found)
                records, scores[name] = records + marked, score.as_dict()
            write_predictions(folder / "predictions.jsonl", records)
            (folder / "scores.json").write_text(json.dumps({"suites": scores}))
            cells.append(
                {
                    "name": "baseline",
                    "role": "baseline",
                    "seed": seed,
                    "status": "done",
                    "folder": f"cells/baseline-{seed}",
                }
            )
        plan = {
            "name": NAME, "baseline": "baseline", "cells": cells,
            "primary": {"suite": "minimal_pairs", "measure": "pair_accuracy"},
            "secondary": [{"suite": "conflict", "measure": "balanced_accuracy"}],
        }  # fmt: skip
        (Path(place) / "study.json").write_text(json.dumps(plan))
        study, begun = read_study(Path(place)), time.process_time()
        read_runs(study)
        return time.process_time() - begun, runs * sum(map(len, items.values()))


def main() -> None:
    """Measure both, print and write them."""
    options = report.parser(__doc__, ["study"]).parse_args()
    environment = report.environment(options.device)
    seconds, count = reading(200 if options.quick else 1000, 2 if options.quick else 8)
    found: dict[str, Any] = {
        "statistics_cpu_seconds": round(statistics(), 2),
        "statistics": {"cells": CELLS, "seeds": SEEDS, "pictures": PICTURES, "endpoints": ENDPOINTS},
        "reading_cpu_microseconds_a_prediction": round(seconds / count * 1e6, 1),
        "reading": {"predictions": count},
    }
    print(json.dumps(found, indent=1))
    report.save(NAME, options.quick, {"environment": environment, **found})


if __name__ == "__main__":
    main()
