"""Methods that go wrong at one sample, and trainings that tell how they ended."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from composer import Callback
from composer.core import Algorithm, Event

from opsin.algorithms.base import VisionAlgorithm, unwrap
from opsin.data.schema import stable_hash
from opsin.models.errors import UserError
from opsin.models.net import nan_safe_zero
from opsin.models.normalise import declare, term
from opsin.models.step import FINAL

import jobs


class Poison(VisionAlgorithm):
    """A loss that is 0, and no number where one sample is in the micro-batch.

    Args:
        sample: its id.
        what: ``nan`` or ``inf``: the loss; ``gradient``: the loss is finite, its gradient NaN.
    """

    name: ClassVar[str] = "poison"

    def __init__(self, sample: str, what: str = "nan"):
        self.uid, self.what = stable_hash(sample), what

    def batch_start(self, model: Any, state: Any, logger: Any) -> None:
        declare(state.batch, self.name, len(state.batch["document_uid"]), "rows")

    def before_forward(self, model: Any, state: Any, logger: Any) -> None:
        model.step(state.batch).taps.add(FINAL)

    def after_loss(self, model: Any, state: Any, logger: Any) -> None:
        batch = state.batch
        hidden = model.step(batch).tapped[FINAL]
        here = bool((batch["document_uid"] == self.uid).any())
        local = nan_safe_zero(hidden)
        if here and self.what == "gradient":
            local = (hidden.sum() * 0).sqrt()
        elif here:
            local = local + float(self.what)
        state.loss[self.name] = term(local, self.name, batch)


class Always(VisionAlgorithm):
    """A loss that is NaN in every step, for every sample."""

    name: ClassVar[str] = "always"

    def batch_start(self, model: Any, state: Any, logger: Any) -> None:
        declare(state.batch, self.name, 1)

    def after_loss(self, model: Any, state: Any, logger: Any) -> None:
        state.loss[self.name] = term(state.loss["lm"].detach() * float("nan"), self.name, state.batch)


class SpoilGradient(Algorithm):
    """One NaN in the gradient of the layer that reads words, before anything is clipped."""

    def match(self, event: Event, state: Any) -> bool:
        return event == Event.AFTER_BACKWARD

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        name = "hf.lm_head.weight"
        unwrap(state.model).net.get_parameter(name).grad.view(-1)[0] = float("nan")


class BreakWeights(Callback):
    """Spoils a weight after a step, as an update does that overflows."""

    def __init__(self, after: int):
        self.after = after

    def batch_end(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) == self.after:
            with torch.no_grad():
                next(p for p in state.model.parameters() if p.requires_grad).view(-1)[0] = float("nan")


class Keep(Callback):
    """Weights, and the optimizer's numbers, after each step."""

    last: ClassVar[list[dict[str, torch.Tensor]]] = []

    def __init__(self) -> None:
        Keep.last = self.steps = []

    def batch_end(self, state: Any, logger: Any) -> None:
        found = {f"w/{n}": v for n, v in jobs.weights_of(state.model).items()}
        for i, held in enumerate(state.optimizers[0].state.values()):
            whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in held.items()}
            found.update({f"o/{i}/{k}": v.detach().clone() for k, v in whole.items()})
        self.steps.append(found)


def ended(**options: Any) -> dict[str, Any]:
    """``jobs.train`` and how it ended: ``said`` (the line of a refusal, or None), ``steps`` (weights after each step)."""
    callbacks = [*options.pop("callbacks", ()), ("poison:Keep", {})]
    try:
        result, said = jobs.train(callbacks=callbacks, **options), None
    except UserError as error:
        result, said = {}, str(error)
    return {**result, "said": said, "steps": Keep.last}


def run_ended(files: list[str], arguments: list[str] = ()) -> str | None:
    """``jobs.run_yaml``, and the line with which it was refused on this rank; None: it came to its end."""
    try:
        jobs.run_yaml(files, arguments)
    except UserError as error:
        return str(error)
    return None
