"""Samples a second of a scheduled mixture of two streams, beside one stream and stock Streaming.

``python benchmarks/mixture_speed.py [--quick]``. As ``data_speed.py``, from a local folder, with single-stream batches;
all read equally many samples.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import report
from data_readers import write_mds
from data_speed import SAMPLES, TITLES, compare, shown

READERS = ("mixture", "opsin", "streaming")


def main() -> None:
    """Measure, print, save."""
    options = report.parser(__doc__, ("all",), rounds=None).parse_args()
    report.quiet()
    rounds = options.rounds or (2 if options.quick else 5)
    body: dict[str, Any] = {"environment": report.environment("cpu"), "samples": SAMPLES, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_mds(root, 512 if options.quick else SAMPLES)
        shutil.copytree(root / "mds", root / "mds-again")
        body["ways"] = compare(root, "folder", READERS, rounds)
    for way, found in body["ways"].items():
        shown(TITLES[way], found)
    report.save("mixture_speed", options.quick, body)


if __name__ == "__main__":
    main()
