"""What each loss term is made of: its value before any weight, the weight, and what it was divided by.

``LossLedger`` knows no method: it reads what ``models.normalise.term`` and ``declare`` left in the batch, so the terms of
another package's method are in it, too. Works in a bare ``composer.Trainer(callbacks=[LossLedger()])``.
"""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from ..models.errors import UserError
from ..models.normalise import TERMS, declared, global_sum, unit_of
from .gradient_shares import GradientShares, differentiate_compiled_layers_twice

_NOT_SHARDED = (
    "gradient_share_interval: gradients are made and summed over ranks in one backward pass of the whole loss; leave it out, "
    "or look under DDP"
)


class LossLedger(Callback):
    """Logs every loss term of every step, and now and then its share of the gradient.

    * ``ledger/TERM/raw``: mean over what the term counts, of the whole step (all micro-batches and ranks), without
      weight; ``loss/train/TERM`` is ``weight`` times it.
    * ``ledger/TERM/weight``: by which its method multiplied it, as differentiation finds it (so a method need not say).
      Missing where a term is read more than once or not at all.
    * ``ledger/TERM/count``: what it is divided by, of the whole step, as declared; 0 where there was nothing. The unit is
      logged once, as hyperparameter ``ledger/TERM/unit`` (``lm``: tokens, by their weights; ``ross``: views;
      ``jarvis``: patches, by the blocks that cover them).
    * with ``gradient_share_interval``: see :class:`~opsin.training.gradient_shares.GradientShares`.

    One all-reduce of a small vector a step, for which nobody waits; values are logged as tensors on the device.
    A key of the loss that came by no ``term`` is in ``loss/train/KEY`` alone.

    Args:
        gradient_share_interval: batches between looks at gradients; None: never. A look costs one more backward pass a term
            and, while it lasts, a copy of the trainable parameters a term. Training is the same, bit for bit.

    Raises:
        UserError: an interval below 1; at the start of a run, gradients are asked for under FSDP2.
    """

    def __init__(self, gradient_share_interval: int | None = None):
        if gradient_share_interval is not None and gradient_share_interval < 1:
            raise UserError(
                f"callbacks.loss_ledger.gradient_share_interval: {gradient_share_interval} is less than 1"
            )
        self.gradient_share_interval = gradient_share_interval
        self.refuses = {"fsdp2=true": _NOT_SHARDED} if gradient_share_interval else {}
        self._raw: torch.Tensor | None = None
        self._weights: list[torch.Tensor | None] = []
        self._names: list[str] = []
        self._parts = 0
        self._units: dict[str, str] = {}
        self._shares: GradientShares | None = None
        self._entries: dict[str, Any] = {}

    def init(self, state: State, logger: Logger) -> None:
        """Refuse what cannot be had."""
        if self.gradient_share_interval and state.fsdp_config is not None:
            raise UserError(f"callbacks.loss_ledger: not with parallelism_config.fsdp2 ({_NOT_SHARDED})")
        if self.gradient_share_interval:
            differentiate_compiled_layers_twice()

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Begin a step; again where one is run again."""
        self._raw, self._weights, self._names, self._parts = None, [], [], 0
        every = self.gradient_share_interval
        ask = every is not None and (int(state.timestamp.batch) + 1) % every == 0
        self._shares = GradientShares(state.model) if ask else None

    def before_backward(self, state: State, logger: Logger) -> None:
        """Add up the terms of a micro-batch, and their gradients if they are asked for."""
        losses: Any = state.loss
        terms: dict[str, torch.Tensor] = state.batch.get(TERMS, {}) if isinstance(state.batch, dict) else {}
        if not terms or not isinstance(losses, dict):
            return
        if self._raw is None:
            self._names = sorted(terms)
            self._weights = _weights(losses, [terms[n] for n in self._names])
        raw = torch.stack([terms[n].detach().double().reshape(()) for n in self._names])
        self._raw = raw if self._raw is None else self._raw + raw
        self._parts += 1
        if self._shares is not None:
            self._shares.add({k: v for k, v in losses.items() if k != "total"})

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Sum over ranks; the device batch is back, with what was declared."""
        self._entries = {}
        if self._raw is None:
            return
        counts = declared(state.batch)
        count = torch.stack([counts[n] for n in self._names]).to(self._raw.device, non_blocking=True)
        total = global_sum(torch.cat([self._raw / (self._parts * dist.get_world_size()), count])).unbind()
        self._units.update({n: unit_of(state.batch, n) for n in self._names})
        for name, raw, number, weight in zip(
            self._names, total, total[len(self._names) :], self._weights, strict=False
        ):
            self._entries[f"ledger/{name}/raw"] = raw
            self._entries[f"ledger/{name}/count"] = number
            if weight is not None:
                self._entries[f"ledger/{name}/weight"] = weight
        if self._shares is not None:
            self._entries.update({f"ledger/{k}": v for k, v in self._shares.entries(self._parts).items()})
            self._shares = None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log; units once."""
        if self._units:
            logger.log_hyperparameters({f"ledger/{n}/unit": u for n, u in self._units.items() if u})
            self._units = {}
        logger.log_metrics(self._entries)


def _weights(losses: dict[str, torch.Tensor], terms: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """How much the step's loss grows with each term: a walk over the few operations between the two."""
    total = losses["total"] if "total" in losses else torch.stack([v.mean() for v in losses.values()]).sum()
    asked = [t for t in terms if t.requires_grad]
    if not asked or not total.requires_grad:
        return [None] * len(terms)
    found = iter(torch.autograd.grad(total, asked, retain_graph=True, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in terms]
