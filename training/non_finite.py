"""A loss or gradient that is no number ends the run before the weights see it, or leaves the batch out.

``NonFinite`` works in a bare ``composer.Trainer(callbacks=[NonFinite()])``; a run has one by its key ``non_finite``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist

from ..models.errors import UserError, nearest
from .culprits import Culprit, samples_of, second_look

log = logging.getLogger(__name__)

POLICIES = ("stop", "skip")
_NAMED = 4
"""Samples that a message names; the file names all."""


class NonFinite(Callback):
    """Stops, or leaves the batch out, when any term of the loss or any gradient is NaN or infinite on any rank.

    Looked at after the backward pass and before the optimizer's update: no weight, no momentum and no checkpoint
    ever holds what came of it. A step costs one sum over the gradients and one all-reduce of a small vector, which
    the host reads where Composer is about to read the loss anyway. Only when something was found the samples are looked
    at one by one (``culprits.second_look``), by all ranks together.

    ``skip``: gradients are taken away on all ranks, so the optimizer changes nothing: weights, momentum and its step
    counts are those before the batch. Time goes on: the scheduler steps, samples and tokens count as seen, and
    ``loss/train/...`` of this step is what it was (null in ``metrics.jsonl``). Logs ``non_finite/skipped``, the number
    so far.

    With ``amp_fp16`` gradients are not looked at: its loss scaling makes them overflow by design, and skips such steps itself.

    Args:
        policy: ``stop`` or ``skip``.
        max_skipped_batches: more than this many since training began stop the run.
        max_in_a_row: so do more than this many one after another; weights that went wrong would skip for ever.
        gradients: look at gradients, too.
        log: JSONL file to which each batch and its samples are appended; None: none.

    Raises:
        UserError: in every rank the same line: what is not finite, the step, samples, the last good checkpoint.
    """

    def __init__(
        self,
        policy: str = "stop",
        max_skipped_batches: int = 10,
        max_in_a_row: int = 3,
        gradients: bool = True,
        log: str | None = None,
    ):
        if policy not in POLICIES:
            raise UserError(f"non_finite '{policy}': unknown{nearest(str(policy), POLICIES)}")
        for key, value in (("max_skipped_batches", max_skipped_batches), ("max_in_a_row", max_in_a_row)):
            if value < 0:
                raise UserError(f"non_finite: {key}: {value} is negative")
        self.policy, self.gradients, self.log = policy, gradients, log
        self.max_skipped_batches, self.max_in_a_row = max_skipped_batches, max_in_a_row
        self.skipped = self.in_a_row = 0
        self._keys: list[str] = []
        self._losses: list[torch.Tensor] = []

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Begin a step; again where one is run again."""
        self._keys, self._losses = [], []

    def before_backward(self, state: State, logger: Logger) -> None:
        """Keep a micro-batch's losses; they are looked at once, when the step is whole."""
        losses = named_losses(state.loss)
        self._keys = list(losses)
        self._losses.append(torch.stack([v.detach().float().mean() for v in losses.values()]))

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Look, with all ranks, and stop or skip."""
        if not self._losses:
            return
        bad = ~torch.stack(self._losses).isfinite().all(0)
        self._losses = []
        look = self.gradients and state.precision != Precision.AMP_FP16
        grads = [p.grad for p in state.model.parameters() if p.grad is not None] if look else []
        flags = torch.cat([bad, ~finite(grads).to(bad.device, non_blocking=True)]).float()
        dist.all_reduce(flags, reduce_operation="MAX")
        found = [bool(f) for f in flags.tolist()]
        if not any(found):
            self.in_a_row = 0
            return
        self._act(state, logger, [k for k, f in zip(self._keys, found[:-1], strict=True) if f], found[-1])

    def _act(self, state: State, logger: Logger, keys: list[str], gradients: bool) -> None:
        weights = torch.stack([(~finite(list(state.model.parameters()))[0]).float()])
        weights = state.device.tensor_to_device(weights)
        dist.all_reduce(weights, reduce_operation="MAX")
        broken = bool(weights.item())
        wrong = _not_finite(state.model) if gradients and not keys else []
        drop_gradients(state)
        culprits = [] if broken else second_look(state, gradients_too=not keys)
        everyone = dist.all_gather_object((culprits, samples_of(state), wrong))
        culprits = [c for found, _, _ in everyone for c in found]
        size = sum(len(samples) for _, samples, _ in everyone)
        names = list(dict.fromkeys(name for _, _, found in everyone for name in found))
        if keys:
            what = " and ".join(f"loss/train/{k}" for k in keys)
            what += " is not finite" if len(keys) == 1 else " are not finite"
        else:
            what = _tensors(names)
        step = int(state.timestamp.batch) + 1
        line = f"step {step}: {what} {_whose(culprits, size, broken)}"
        self.skipped += 1
        self.in_a_row += 1
        self._note(step, keys, culprits, [s for _, samples, _ in everyone for s in samples])
        stop = self._why_stop(broken)
        if stop is not None:
            good = dist.all_gather_object(last_good_checkpoint(state, before_now=broken))[0]
            raise UserError(f"{line}; {stop}; {good}")
        if dist.get_global_rank() == 0:
            log.warning("%s; left out (%d so far)", line, self.skipped)
        logger.log_metrics({"non_finite/skipped": self.skipped})

    def _why_stop(self, broken: bool) -> str | None:
        if self.policy == "stop":
            hint = "" if broken else " (non_finite: skip leaves such batches out)"
            return f"stopped before the optimizer's update{hint}"
        if broken:
            return "no batch can be learnt from any more"
        if self.skipped > self.max_skipped_batches:
            return f"{self.skipped} batches were left out, more than max_skipped_batches={self.max_skipped_batches}"
        if self.in_a_row > self.max_in_a_row:
            return f"{self.in_a_row} batches in a row, more than {self.max_in_a_row}, were to be left out"
        return None

    def _note(self, step: int, keys: list[str], culprits: list[Culprit], samples: list[Culprit]) -> None:
        if self.log is None or dist.get_global_rank():
            return
        entry = {
            "step": step,
            "losses": keys or ["gradient"],
            "samples": [c._asdict() for c in culprits or samples],
            "found": bool(culprits),
        }
        path = Path(self.log)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """Batches left out so far."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])


def named_losses(loss: Any) -> dict[str, torch.Tensor]:
    """A model's loss by key, whatever form Composer lets it have; a given ``total`` is no term."""
    if isinstance(loss, dict):
        return {k: v for k, v in loss.items() if k != "total"} or loss
    if isinstance(loss, torch.Tensor):
        return {"total": loss}
    return {f"loss{i}": v for i, v in enumerate(loss)}


def finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Whether all numbers of some tensors (of sharded ones: this rank's) are finite: (1,) bool on their device.

    By the sum of absolute values: NaN and infinity show in it, and it overflows only beyond 3e38.
    """
    local = [getattr(t, "_local_tensor", t).detach() for t in tensors if t.is_floating_point()]
    if not local:
        return torch.ones(1, dtype=torch.bool)
    sums = torch._foreach_norm(local, 1.0, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(sums).isfinite().all().reshape(1)


def drop_gradients(state: State) -> None:
    """Take all gradients away: an update does nothing then."""
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    for parameter in state.model.parameters():
        parameter.grad = None


def last_good_checkpoint(state: State, before_now: bool) -> str:
    """Where training can go on: the newest checkpoint that exists.

    Args:
        state: Composer's state.
        before_now: not one that holds the weights as they are now, which are broken.
    """
    now = int(state.timestamp.batch)
    for saver in (c for c in state.callbacks if isinstance(c, CheckpointSaver)):
        found = [(int(t.batch), name) for name, t in saver.all_saved_checkpoints_to_timestamp.items()]
        for batch, name in sorted(found, reverse=True):
            path = Path(name).parent if state.fsdp_sharded_state_dict_enabled else Path(name)
            uploaded = saver.remote_uploader is not None  # and perhaps no longer here
            if (path.exists() or uploaded) and not (before_now and batch >= now):
                where = path if path.exists() else f"{path.name} in the save folder"
                return f"last good checkpoint: {where} (step {batch})"
    return "no checkpoint was saved yet"


def _not_finite(model: Any) -> list[str]:
    """Names of the parameters with a gradient that is not finite, on this rank."""
    return [
        name.removeprefix("module.")
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(finite([parameter.grad]))
    ]


def _tensors(names: list[str]) -> str:
    """Whose gradient, in words. Clipping by one norm spreads a NaN to all that it clips, so the first is said to be no more."""
    if len(names) == 1:
        return f"the gradient of {names[0]} is not finite (its losses are)"
    return f"the gradients of {len(names)} tensors, such as {names[0]}, are not finite (the losses are)"


def _whose(culprits: list[Culprit], size: int, broken: bool) -> str:
    """For which samples, in words."""
    if broken:
        return "because weights are not finite since the update before"
    if not culprits:
        return f"for the batch of {size} samples, and for none of them alone"
    said = _listed(f"'{c.id}' (uid {c.uid}, rank {c.rank})" for c in culprits)
    if len(culprits) == size and size > 1:
        return f"for every one of its {size} samples, so look at settings before data: {said}"
    return f"for {'sample' if len(culprits) == 1 else f'{len(culprits)} of {size} samples:'} {said}"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
