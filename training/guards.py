"""Callbacks that stop a run where users otherwise find out a day later."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, reproducibility

from ..data.encode import Status
from ..models.errors import UserError


class SkippedSamples(Callback):
    """Counts samples that could not be used, by reason, over all ranks; stops above a share.

    Args:
        limit: largest share of unusable samples, checked after 4, 16 and every ``interval`` batches and at the
            ends of epochs and training.
        log: where the samples are named.
        interval: batches between checks.
    """

    def __init__(self, limit: float, log: str, interval: int = 50):
        self.limit = limit
        self.log = log
        self.interval = interval
        self.counts = torch.zeros(len(Status), dtype=torch.int64)
        self.truncated = 0

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Count a device batch."""
        self.counts += torch.bincount(state.batch["sample_status"].long(), minlength=len(Status))
        self.truncated += int(state.batch["truncated_turns"].sum())

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check now and then."""
        done = int(state.timestamp.batch)
        if done % self.interval == 0 or done in (4, 16):
            self._check(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Check."""
        self._check(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Check: a run may end in mid-epoch."""
        self._check(state, logger)

    def _check(self, state: State, logger: Logger) -> None:
        total = state.device.tensor_to_device(torch.cat([self.counts, torch.tensor([self.truncated])]))
        dist.all_reduce(total)
        *numbers, truncated = total.tolist()
        numbers[Status.PADDING] = 0  # no samples
        skipped = sum(numbers) - numbers[Status.USED]
        reasons = {s.name.lower(): numbers[s] for s in Status if s != Status.USED and numbers[s]}
        logger.log_metrics(
            {
                "data/truncated_turns": truncated,
                "data/skipped": skipped,
                **{f"data/skipped_{k}": v for k, v in reasons.items()},
            }
        )
        if skipped > self.limit * max(sum(numbers), 1):
            why = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
            raise UserError(
                f"{skipped} of {sum(numbers)} samples cannot be used ({why}), more than preflight.max_skipped="
                f"{self.limit:g}; they are named in {self.log}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Counts so far."""
        return {"counts": self.counts.tolist(), "truncated": self.truncated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        counts = torch.tensor(
            state["counts"], dtype=torch.int64
        )  # of a checkpoint that knew fewer reasons, perhaps
        self.counts = torch.nn.functional.pad(counts, (0, len(Status) - len(counts)))
        self.truncated = int(state.get("truncated", 0))


class RestoreRandomState(Callback):
    """Restores random states when a run resumes inside an epoch.

    Composer 0.32.1 restores them only at an epoch's start or while it spins a loader forward, which a
    streaming dataset makes unnecessary; dropout would then differ from the uninterrupted run.
    """

    def __init__(self) -> None:
        self.saved: Any = None

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Before the first batch after resumption."""
        self._restore()

    def epoch_end(self, state: State, logger: Logger) -> None:
        """The checkpoint was made after the epoch's last batch: the next epoch's loader draws its seed from the state."""
        self._restore()

    def _restore(self) -> None:
        if self.saved is not None:
            reproducibility.load_rng_state(self.saved)
            self.saved = None


class EveryParameterTrained(Callback):
    """After the first step: every trainable parameter must have had a gradient.

    One that has none makes a checkpoint that cannot be resumed (Composer loads optimizer state strictly).
    """

    def __init__(self) -> None:
        self.done = False

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Look once."""
        if self.done:
            return
        self.done = True
        idle = [n for n, p in state.model.named_parameters() if p.requires_grad and p.grad is None]
        if idle:
            raise UserError(
                f"{len(idle)} trainable tensors got no gradient in the first step, such as {idle[0]}: freeze them "
                "(trainable.<part>: false) or make the loss use them"
            )
