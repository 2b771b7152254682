"""Whether a study made again is the same: ``python benchmarks/same_again.py STUDY AGAIN``.

Of every run that both folders have: weights after each stage, and predictions (which hold every question's answer and
likelihoods), compared byte for byte. Exit code 1 where one differs, or where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import filecmp
from pathlib import Path

WEIGHTS, PREDICTIONS = "model.safetensors", "predictions.jsonl"


def files_of(study: Path, run: str) -> dict[str, Path]:
    """What a run left that must be the same again: ``align``: weights after that stage, ``predictions``."""
    found = {
        p.parents[1].name: p for p in sorted((study / "runs" / run / "stages").glob(f"*/model/{WEIGHTS}"))
    }
    last = study / "runs" / run / "model" / WEIGHTS
    return {**found, "last": last, "predictions": study / "cells" / run / PREDICTIONS}


def differing(study: Path, again: Path, run: str) -> list[str]:
    """Names of what differs, or is missing in one of the two."""
    first, second = files_of(study, run), files_of(again, run)
    return [
        name
        for name in sorted(first.keys() | second.keys())
        if name not in first
        or name not in second
        or not (first[name].is_file() and second[name].is_file())
        or not filecmp.cmp(first[name], second[name], shallow=False)
    ]


def main() -> int:
    """Compare, print a line a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("again", type=Path)
    given = parser.parse_args()
    done = [sorted(p.parent.name for p in f.glob("cells/*/cell.json")) for f in (given.study, given.again)]
    both = [name for name in done[1] if name in done[0]]
    wrong = 0
    for run in both:
        different = differing(given.study, given.again, run)
        wrong += bool(different)
        kinds = ", ".join(files_of(given.study, run))
        print(f"{run}: {'differs: ' + ', '.join(different) if different else f'equal to the byte ({kinds})'}")
    print(f"{len(both) - wrong} of {len(both)} runs equal; {len(done[0])} and {len(done[1])} runs done")
    return int(wrong > 0 or not both)


if __name__ == "__main__":
    raise SystemExit(main())
