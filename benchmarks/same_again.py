"""Whether a study made again is the same: ``python benchmarks/same_again.py STUDY AGAIN``.

Of every run that is done in both folders: weights after each stage, and predictions (answers, and their likelihood where it was
asked for), compared byte for byte. Exit code 1 where one differs, 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import sys
from collections.abc import Sequence
from pathlib import Path

WEIGHTS, PREDICTIONS = "model.safetensors", "predictions.jsonl"


def done(study: Path) -> list[str]:
    """Names of the runs that are done."""
    return sorted(p.parent.name for p in study.glob("cells/*/cell.json"))


def files_of(study: Path, run: str) -> dict[str, Path]:
    """What a run left that must be the same again: a stage's name -> its weights, and ``predictions``."""
    folder = study / "runs" / run
    stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    weights = {name: folder / "stages" / name / "model" / WEIGHTS for name in stages}
    return {
        **weights,
        "model": folder / "model" / WEIGHTS,
        "predictions": study / "cells" / run / PREDICTIONS,
    }


def differing(first: dict[str, Path], second: dict[str, Path]) -> list[str]:
    """Names of what is not the same; what one of the two lacks is not the same either."""

    def same(name: str) -> bool:
        one, other = first.get(name), second.get(name)
        if one is None or other is None or not (one.is_file() and other.is_file()):
            return False
        return filecmp.cmp(one, other, shallow=False)

    return sorted(name for name in first.keys() | second.keys() if not same(name))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print a line a run."""
    parser = argparse.ArgumentParser(
        description="Compare the runs of a study with those of the same study made again."
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("again", type=Path)
    given = parser.parse_args(arguments)
    for folder in (given.study, given.again):
        if not done(folder):
            print(f"{folder}: no study with runs that are done: it has no cells/*/cell.json", file=sys.stderr)
            return 2
    if given.study.samefile(given.again):
        print(f"{given.again}: is the same folder", file=sys.stderr)
        return 2
    both = [run for run in done(given.again) if run in done(given.study)]
    if not both:
        print(f"{given.again}: none of its runs is one of {given.study}'s", file=sys.stderr)
        return 2
    wrong = 0
    for run in both:
        first, second = files_of(given.study, run), files_of(given.again, run)
        different = differing(first, second)
        wrong += bool(different)
        print(
            f"{run}: {'differs: ' + ', '.join(different) if different else 'equal to the byte: ' + ', '.join(first)}"
        )
    alone = len(done(given.study)) - len(both)
    print(
        f"{len(both) - wrong} of {len(both)} runs equal; {alone} of the study's are not in {given.again.name}"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
