"""``metrics.jsonl``: a line a step, under Composer's metric names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist


class MetricsFile(LoggerDestination):
    """Collects what is logged during a step and appends it as one JSON line when the step ends.

    A resumed run first drops the lines of steps that it will run again.

    Args:
        path: file, shared by all stages of a run.
        stage: written into each line.
    """

    def __init__(self, path: str | Path, stage: str):
        self.path = Path(path)
        self.stage = stage
        self._pending: dict[str, float | torch.Tensor] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep numbers until the step ends; what lies on a device stays there so long, and nobody waits for it."""
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                if value.numel() == 1:
                    self._pending[name] = value.detach().clone()  # it may be added to before it is written
                continue
            try:
                self._pending[name] = float(value)
            except (TypeError, ValueError):
                continue

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop lines from the current step on: they will come again."""
        if dist.get_global_rank() or not self.path.is_file():
            return
        now = int(state.timestamp.batch)
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if entry.get("stage") != self.stage or entry.get("step", 0) <= now:
                kept.append(line)
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Write the line of the step before: evaluations and ends of epochs belong to it."""
        self._write(int(state.timestamp.batch))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the last step's line."""
        self._write(int(state.timestamp.batch))

    def _write(self, step: int) -> None:
        if step == 0:
            return
        pending, self._pending = self._pending, {}
        if dist.get_global_rank() or "loss/train/total" not in pending:
            return
        numbers = {k: float(v) for k, v in pending.items()}
        clean = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **clean}) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
