"""A progress bar that names the losses."""

from __future__ import annotations

import sys
import time
from typing import Any

from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar(LoggerDestination):
    """One bar a stage with every loss by name; without a terminal, one line every ``every`` seconds.

    Args:
        stage: shown in front.
        every: seconds between lines where no terminal is.
    """

    def __init__(self, stage: str, every: float = 10.0):
        self.stage = stage
        self.every = every
        self._losses: dict[str, Any] = {}
        self._bar: Progress | None = None
        self._last = 0.0

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember the newest losses."""
        for name, value in metrics.items():
            if name.startswith("loss/train/"):
                self._losses[name.removeprefix("loss/train/")] = value
            elif name.startswith("l2t/loss_") and name.count("_") == 1:
                self._losses[name.removeprefix("l2t/")] = value  # perhaps on a device: read when it is drawn

    def fit_start(self, state: State, logger: Logger) -> None:
        """Open the bar."""
        if dist.get_global_rank():
            return
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[losses]}"),
                console=console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=total_batches(state), losses="")

    def batch_end(self, state: State, logger: Logger) -> None:
        """Move on."""
        if dist.get_global_rank():
            return
        last = int(state.timestamp.batch) == total_batches(state)
        if self._bar is None and time.monotonic() - self._last <= self.every and not last:
            return
        losses = "  ".join(
            f"{name} {float(value):.3f}" for name, value in self._losses.items() if name != "total"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=int(state.timestamp.batch), losses=losses)
        else:
            self._last = time.monotonic()
            total = total_batches(state)
            print(
                f"{self.stage} {int(state.timestamp.batch)}/{total or '?'}  {losses}",
                file=sys.stderr,
                flush=True,
            )

    def fit_end(self, state: State, logger: Logger) -> None:
        """Close the bar."""
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Close the bar, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def total_batches(state: State) -> int | None:
    """Steps of the whole stage, where they are known."""
    duration = state.max_duration
    if duration is None:
        return None
    if duration.unit == TimeUnit.BATCH:
        return int(duration.value)
    if duration.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        return int(duration.value) * int(state.dataloader_len)
    return None
