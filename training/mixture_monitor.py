"""What a run really was trained on: samples and tokens by stream."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from ..data.batch import effective_weights


class MixtureMonitor(Callback):
    """Counts samples, tokens and learnt tokens of each stream, over all ranks, since training began.

    Logs ``mixture/samples/STREAM``, ``mixture/tokens/STREAM``, ``mixture/learnt/STREAM`` (tokens whose loss counts) and,
    where the dataset has a mixture, ``mixture/weight/STREAM`` (its share in force). A stage with several streams has one
    by itself.

    Args:
        interval: batches between entries; the ends of epochs and of training have one, too.
    """

    def __init__(self, interval: int = 50):
        self.interval = interval
        self.counts: torch.Tensor | None = None  # (3, S) of all ranks, up to the last sum
        self._new: torch.Tensor | None = None  # of this rank, since then

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Count a device batch (on the CPU), after what methods did to it."""
        batch, names = state.batch, _streams(state)
        stream, owner = batch["sample_stream"].long(), batch["document_sample"]
        document = batch["document_ids"].long()
        of_token = owner.gather(1, document.clamp(min=0))
        of_token = torch.where((document >= 0) & (of_token >= 0), stream[of_token.clamp(min=0)], -1)
        learnt = effective_weights(batch)[0] > 0
        counts = [stream, of_token[batch["attention_mask"].bool()], of_token[learnt]]
        here = torch.stack([torch.bincount(c[c >= 0], minlength=len(names)) for c in counts])
        self._new = here if self._new is None else self._new + here

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log now and then."""
        if int(state.timestamp.batch) % self.interval == 0:
            self._log(state, logger)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """What a checkpoint keeps is of all ranks."""
        self._sum(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Log."""
        self._log(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Log: a run may end in mid-epoch."""
        self._log(state, logger)

    def _sum(self, state: State) -> None:
        if self._new is None:
            return
        total = state.device.tensor_to_device(self._new)
        dist.all_reduce(total)  # nobody waits for it: it is read where it is logged or saved
        self.counts = total if self.counts is None else self.counts.to(total.device) + total
        self._new = None

    def _log(self, state: State, logger: Logger) -> None:
        self._sum(state)
        if self.counts is None:
            return
        names = _streams(state)
        metrics: dict[str, float] = {}
        for key, row in zip(("samples", "tokens", "learnt"), self.counts.tolist(), strict=True):
            metrics.update({f"mixture/{key}/{name}": n for name, n in zip(names, row, strict=True)})
        mixture = getattr(getattr(state.dataloader, "dataset", None), "mixture", None)
        if mixture is not None:
            at = int(state.timestamp.epoch) * mixture.epoch_batches + int(state.timestamp.batch_in_epoch)
            metrics.update({f"mixture/weight/{k}": v for k, v in mixture.weights_at(at).items()})
        logger.log_metrics(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Counts so far."""
        return {"counts": None if self.counts is None else self.counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.counts = None if state["counts"] is None else torch.tensor(state["counts"], dtype=torch.int64)


def _streams(state: State) -> list[str]:
    """Names of the training data's streams."""
    return getattr(getattr(state.train_dataloader, "dataset", None), "stream_names", ["all"])
