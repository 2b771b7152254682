"""Run the benchmarks one after another, each in a process of its own: ``python benchmarks/run.py [--quick]``.

Tables go to the terminal, numbers to ``benchmarks/results``. A machine in use gives wide quartiles: look at
them, and at ``load_before``, before a ratio is believed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = {
    "step_speed": ["--profile"],
    "packing": [],
    "l2t_cost": [],
    "ross_cost": [],
    "jarvis_masks": [],
    "jarvis_cost": [],
    "data_speed": ["--profile"],
    "data_start": [],
    "mixture_speed": [],
    "convert_speed": [],
    "fusion_cost": [],
    "eval_speed": [],
}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    """Run what was asked for; 1 if any of it failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="this one; may be repeated")
    parser.add_argument(
        "--quick", action="store_true", help="few repeats; results carry '.quick' in their name"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    environment = {**os.environ}
    environment.setdefault("OMP_NUM_THREADS", str(cores()))
    failed = []
    for name in options.only or BENCHMARKS:
        command = [sys.executable, str(HERE / f"{name}.py"), *BENCHMARKS[name], "--device", options.device]
        print(f"== {name}", flush=True)
        begun = time.monotonic()
        done = subprocess.run(
            [*command, *(["--quick"] if options.quick else [])], env=environment, check=False
        )
        print(f"== {name}: {time.monotonic() - begun:.0f} s\n", flush=True)
        if done.returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
