"""Tables of ``vift_cells.py``, and its results as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report

COLUMNS = {
    "begins/image": "image",
    "begins/image/colour": "colour",
    "begins/image/size": "size",
    "begins/image/shape": "shape",
    "exact/image": "image, exact",
    "begins/text_skill": "text skill on images",
    "begins/minimal_pairs": "minimal pairs",
    "begins/conflict": "conflict",
    "prior/conflict": "prior answers",
}
AFTER = {
    "exact/text": "text",
    "exact/skill_in_text": "text skill in text",
    "begins/no_picture": "image, no picture",
}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": deviation, "values": [round(v, 4) for v in values]}


def shown(found: dict[str, Any]) -> str:
    """``.55 ±.03``."""
    return f"{found['mean']:.2f} ±{found['sd']:.2f}"


def report_cells(
    work: Path, seeds: Sequence[int], dev: Sequence[int], best: dict[str, Any], options: Any
) -> None:
    """Print the tables, write ``results/vift_cells.json``."""
    body: dict[str, Any] = {
        "environment": report.environment("cpu"),
        "seeds": list(seeds), "dev_seeds": list(dev), "steps": options.steps, "chosen": best, "cells": {}, "sweep": {},
    }  # fmt: skip
    for cell in options.cells:
        plain, fused, learnt, before, differences = [], [], [], [], []
        for seed in seeds:
            one = json.loads((work / "measured" / f"{cell}-{seed}.json").read_text())
            plain.append(one["plain"])
            learnt.append(one["learnt"])
            if "before" in one:
                before.append(one["before"])
            fused.append(json.loads((work / "fused" / f"{cell}-{seed}.json").read_text())["fused"])
        differences = [{k: f[k] - p[k] for k in f} for p, f in zip(plain, fused, strict=True)]
        body["cells"][cell] = {
            name: {key: spread([run[key] for run in runs]) for key in runs[0]}
            for name, runs in (("plain", plain), ("fused", fused), ("fused - plain", differences))
        }
        body["cells"][cell]["learnt"] = learnt[0]
        if before:
            body["before"] = {key: spread([run[key] for run in before]) for key in before[0]}
        sweeps = [json.loads((work / "measured" / f"{cell}-{s}.json").read_text()) for s in dev]
        body["sweep"][cell] = [
            {
                "strength": row["strength"],
                "ratio": row["ratio"],
                **{key: statistics.fmean(s["sweep"][i][key] for s in sweeps) for key in COLUMNS},
            }
            for i, row in enumerate(sweeps[0]["sweep"])
        ]
        none = {key: statistics.fmean(s["plain"][key] for s in sweeps) for key in COLUMNS}
        body["sweep"][cell].insert(0, {"strength": 0.0, "ratio": 0.0, **none})
    rows = [
        (cell, name, *(shown(of[name][key]) for key in COLUMNS))
        for cell, of in body["cells"].items()
        for name in ("plain", "fused", "fused - plain")
    ]
    report.table(f"{len(seeds)} seeds, mean ± sd", ("cell", "answers", *COLUMNS.values()), rows)
    rows = [
        (
            cell,
            *(shown(of["plain"][key]) for key in AFTER),
            str(sum(v for k, v in of["learnt"].items() if "learnt" in k)),
        )
        for cell, of in body["cells"].items()
    ]
    if "before" in body:
        rows.insert(
            0, ("before", *(shown(body["before"][k]) if k in body["before"] else "" for k in AFTER), "")
        )
    report.table("without fusion", ("cell", *AFTER.values(), "learnt tokens"), rows)
    for cell, settings in body["sweep"].items():
        rows = [
            (f"{s['strength']:g}", f"{s['ratio']:g}", *(f"{s[k]:.2f}" for k in COLUMNS)) for s in settings
        ]
        report.table(f"sweep, {cell} ({len(dev)} dev seeds)", ("strength", "ratio", *COLUMNS.values()), rows)
    report.save("vift_cells", options.quick, body)
