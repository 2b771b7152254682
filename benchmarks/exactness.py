"""How far every subset of the methods is from its numbers in one process: on ranks, and resumed.

    python benchmarks/exactness.py            # writes results/exactness.json, prints the table

The model, data and arguments are those of the tests (``tests/algorithms/settings.py``): tiny LLaVA, 8x8 patches, all heads
loud, float32, gloo on a CPU. DDP and FSDP2: two ranks, micro-batches of 1, three global batches of 8 at the same weights
(rate 0), of which one has pictures on one rank alone and one has none; against one process and one micro-batch.
Resumed: four steps that learn, against the same from the checkpoint of the second. A difference is the largest of any loss
term over the largest term of its step, and of any gradient entry over the largest of its part (base model, each head).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "algorithms")]

import jobs  # noqa: E402
import settings  # noqa: E402
from compare import gradient_difference, loss_difference  # noqa: E402
from ranks import RankPool  # noqa: E402

WAYS = ("ddp", "fsdp2", "resumed")


def differences(a: dict[str, Any], b: dict[str, Any], steps: slice = slice(None)) -> dict[str, float]:
    return {"losses": loss_difference(a, b, steps), "gradients": gradient_difference(a, b, steps)}


def resumed(subset: tuple[str, ...]) -> dict[str, float]:
    """Four steps, and the last two of them from a checkpoint."""
    samples = [*settings.mixed(1), *settings.text_only(20), *settings.mixed(11), *settings.mixed(21)]
    options = {
        "samples": samples, "global_batch": 4, "microbatch": 2, "steps": 4,
        "algorithms": settings.algorithms(subset), **settings.MODEL,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        whole = jobs.train(**options, trainer={"save_folder": folder, "save_interval": "2ba"})
        again = jobs.train(**options, trainer={"load_path": f"{folder}/ep0-ba2-rank0.pt"})
    rest = {key: whole[key][2:] for key in ("losses", "gradients")}
    weights = [(whole["weights"][n] - w).abs().max() for n, w in again["weights"].items()]
    return {**differences(rest, again), "weights": float(torch.stack(weights).max())}


def measure(subset: tuple[str, ...], pool: RankPool) -> dict[str, dict[str, float]]:
    options = {
        "samples": settings.uneven(), "steps": 3, "lr": 0.0, "max_seq_len": 1500,
        "algorithms": settings.algorithms(subset), **settings.MODEL,
    }  # fmt: skip
    one = jobs.train(**options)
    found: dict[str, dict[str, float]] = {}
    for parallel in ("ddp", "fsdp2"):
        results = pool.run("jobs:train", **options, parallel=parallel, microbatch=1, timeout=300)
        assert all(r["fsdp"] == (parallel == "fsdp2") for r in results)
        each = [differences(one, r) for r in results]
        found[parallel] = {key: max(d[key] for d in each) for key in each[0]}
    return {**found, "resumed": resumed(subset)}


def table(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown; losses / gradients."""
    lines = ["| subset | 1 process | DDP 2 | FSDP2 2 | resumed |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        cells = [f"{row[w]['losses']:.0e} / {row[w]['gradients']:.0e}".replace("0e+00", "0") for w in WAYS]
        lines.append(f"| {name} | 0 | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "exactness.json")
    parser.add_argument("--only", nargs="*", help="subsets, such as ross+l2t; default: all 16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pool, rows = RankPool(2), {}
    try:
        for subset in settings.SUBSETS:
            name = settings.name_of(subset)
            if not arguments.only or name in arguments.only:
                rows[name] = measure(subset, pool)
                print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
    finally:
        pool.close()
    body = {"torch": torch.__version__, "machine": platform.machine(), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(body, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
