"""Timing and peak memory, such that two variants can be compared on a machine that is not quite still.

Variants take turns (A, B, A, B, ...), so that what else the machine does falls on all of them. Memory is
measured in a fresh process for each variant, because an allocator keeps what an earlier one has asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


@dataclass
class Timed:
    """What a variant gives back: seconds of each step it ran, and its loss."""

    seconds: list[float]
    loss: float = float("nan")


Variant = Callable[[], Timed]


@dataclass
class Series:
    """Times of one variant, a list for each round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def of_rounds(self) -> list[float]:
        """Median of each round."""
        return [statistics.median(r) for r in self.rounds]

    @property
    def median(self) -> float:
        """Median of all steps."""
        return statistics.median(s for r in self.rounds for s in r)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds a step."""
        low, _, high = quartiles([s for r in self.rounds for s in r])
        return {
            "median_s": self.median,
            "quartiles_s": [low, high],
            "rounds_s": [[round(s, 6) for s in r] for r in self.rounds],
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; a single value is all three."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interleave(
    variants: dict[str, Variant],
    *,
    rounds: int,
    seconds: float,
    warmup: int = 1,
    least: int = 3,
) -> dict[str, Series]:
    """Run variants in turns; the order is reversed every other round, so that none always follows the same one.

    Args:
        variants: name -> callable that runs and times some steps.
        rounds: most rounds.
        seconds: no new round begins after this time, warm-up included ...
        warmup: rounds that do not count.
        least: ... unless there are fewer rounds than this.
    """
    begun = time.perf_counter()
    series = {name: Series() for name in variants}
    for number in range(warmup + rounds):
        done = number - warmup
        if done >= min(least, rounds) and time.perf_counter() - begun > seconds:
            break
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in order:
            gc.collect()
            timed = variants[name]()
            if done >= 0:
                series[name].rounds.append(timed.seconds)
    return series


def ratio(slow: Series, fast: Series) -> dict[str, Any]:
    """How many times faster ``fast`` is: ratio of medians, and quartiles of the ratios of single rounds."""
    paired = [a / b for a, b in zip(slow.of_rounds, fast.of_rounds, strict=True)]
    low, _, high = quartiles(paired)
    return {"ratio": slow.median / fast.median, "quartiles": [low, high], "rounds": len(paired)}


def agreeing(losses: dict[str, float], tolerance: float = 1e-4) -> None:
    """Stop if variants that claim to compute the same loss do not."""
    if max(losses.values()) - min(losses.values()) > tolerance or any(v != v for v in losses.values()):
        raise SystemExit(f"losses differ by more than {tolerance}: {losses}")


def synchronise(device: str) -> None:
    """Wait for the device, where it works on its own."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_of(step: Callable[[], Any], device: str) -> dict[str, float]:
    """MiB that one call of ``step`` needs at most, beyond what is held before it; and the whole at that moment.

    On a CPU from the resident set's high-water mark, which is reset where the system allows it; else the
    process's all-time maximum, which is the same unless something before the step needed more.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return {"step_MiB": (peak - before) / MIB, "peak_MiB": peak / MIB, "before_MiB": before / MIB}
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back, or the step would reuse it unseen
    reset = _reset_high_water()
    before = _status("VmRSS") or _maxrss()
    step()
    peak = (_status("VmHWM") if reset else None) or _maxrss()
    return {"step_MiB": (peak - before) / MIB, "peak_MiB": peak / MIB, "before_MiB": before / MIB}


def _reset_high_water() -> bool:
    before = _status("VmHWM")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return before is not None


def _status(key: str) -> int | None:
    """Bytes of one entry of /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(found[0]) * 1024 if found else None


def _maxrss() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_fresh_process(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark's script in a process of its own; the last line it prints is its answer as JSON.

    glibc keeps freed pieces of up to 32 MiB, gigabytes of activations among them; told to map everything above
    64 KiB by itself, it gives freed tensors back at once, and resident memory is what is really in use.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_MMAP_MAX_": str(2**20)},
    )
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {' '.join(arguments)} ended with exit code {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])
