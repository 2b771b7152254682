"""What every benchmark prints and writes: the machine, a table, one JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "mosaicml", "accelerate")


def parser(description: str | None, shapes: Sequence[str], **defaults: Any) -> argparse.ArgumentParser:
    """Options that all benchmarks share."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument(
        "--shape", action="append", choices=shapes, help="model shape; may be repeated; default: all"
    )
    made.add_argument(
        "--quick", action="store_true", help="few repeats; results carry '.quick' in their name"
    )
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--rounds", type=int, default=None, help="most rounds a shape")
    made.add_argument("--seconds", type=float, default=None, help="time for the rounds of a shape")
    made.set_defaults(**defaults)
    return made


def quiet() -> None:
    """Silence libraries whose warnings would hide the tables."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()


def environment(device: str) -> dict[str, Any]:
    """Versions and machine: what a number means nothing without."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        **versions,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def path_of(name: str, quick: bool, suffix: str = ".json") -> Path:
    """File of a result; those of quick runs are not kept in the repository."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}{'.quick' if quick else ''}{suffix}"


def save(name: str, quick: bool, body: dict[str, Any]) -> None:
    """Write ``results/<name>.json``."""
    path = path_of(name, quick)
    path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console().print(f"written: benchmarks/results/{path.name}\n")


def console() -> Console:
    """Console that is wide enough for the tables when the output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=130)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print one table; the first column is text, the others are numbers."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*(str(cell) for cell in row))
    console().print(shown)


def spread(found: dict[str, Any]) -> str:
    """A ratio with its quartiles: ``1.23 (1.20 .. 1.25)``."""
    low, high = found["quartiles"]
    return f"{found['ratio']:.3f} ({low:.3f} .. {high:.3f})"
