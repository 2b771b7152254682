"""``python -m opsin.evaluation.study FOLDER``: a study's ``ablation.json`` and ``report.html``, without a model."""

from __future__ import annotations

import sys
from pathlib import Path

from ...models.errors import UserError
from .page import write_study_report


def main(arguments: list[str]) -> int:
    """Write both; 2 and one line if the study cannot be read."""
    if len(arguments) != 1:
        print("usage: python -m opsin.evaluation.study FOLDER", file=sys.stderr)
        return 2
    try:
        print(write_study_report(Path(arguments[0])))
    except UserError as error:
        print(f"opsin: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
