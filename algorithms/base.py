"""What every method is: a Composer algorithm that acts on events and nothing else.

A method has a handler for each event it needs (``init``, ``after_dataloader``, ``batch_start``, ...). It works in a
bare ``composer.Trainer(algorithms=[Method()])`` as well as from YAML.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from composer.core import Algorithm, Event, State, get_precision_context
from composer.loggers import Logger
from torch import nn

from ..models.compile import compile_head
from ..models.errors import UserError
from ..models.vlm import VisionLanguageModel

_HANDLERS: dict[Event, str] = {
    Event.INIT: "init",
    Event.BEFORE_LOAD: "before_load",
    Event.AFTER_LOAD: "after_load",
    Event.FIT_START: "fit_start",
    Event.AFTER_DATALOADER: "after_dataloader",
    Event.BATCH_START: "batch_start",
    Event.BEFORE_FORWARD: "before_forward",
    Event.AFTER_LOSS: "after_loss",
    Event.AFTER_BACKWARD: "after_backward",
    Event.AFTER_TRAIN_BATCH: "after_train_batch",
    Event.BATCH_END: "batch_end",
    Event.EPOCH_END: "epoch_end",
    Event.EPOCH_CHECKPOINT: "epoch_checkpoint",
    Event.FIT_END: "fit_end",
}


class VisionAlgorithm(Algorithm):
    """Base of Opsin's methods.

    Subclasses have any of ``init``, ``before_load``, ``after_load``, ``fit_start``, ``after_dataloader``,
    ``batch_start``, ``before_forward``, ``after_loss``, ``after_backward``, ``after_train_batch`` (before the optimizer's
    update), ``batch_end``, ``epoch_end``, ``epoch_checkpoint`` (after evaluators, before a checkpoint is made), ``fit_end``; each takes (model, state, logger). Only events with a handler match.

    * ``after_dataloader``/``batch_start`` see the whole device batch on the CPU: rewrite labels, add small
      tensors under ``token/<name>`` (B, L), ``row/<name>`` (B, ...) or ``patch/<name>`` (P, ...), a function under
      ``cut/<name>`` for indexes of each micro-batch (``data.batch``), declare counts (``models.normalise.declare``).
    * ``before_forward`` writes into ``model.step(state.batch)``; ``after_loss`` reads it and adds the
      method's own key to ``state.loss``. Since nobody reads before everybody wrote, the order of methods
      never matters.

    Class attributes:
        name: registered name; keys randomness, heads and log entries.
        stages: stages of a run in which the paper uses the method.
        loss_keys: keys it adds to the loss.
        needs: what it needs of data, family and attention (``training.compatibility.NEEDS``): ``images``, ``masks`` ...
        refuses: settings it cannot work with -> why. ``"packing=true"``; several, joined by commas, must all hold; a
            name is a setting, a key of the YAML or a keyword of the method: ``"head=mlp, fsdp2=true"``, ``"masks!=none"``.
        warns: the same, for settings with which it works, but not as one may expect. These three may be set by an
            instance, where its arguments decide; ``training.compatibility`` makes refusals, warnings and a page of the
            docs of them.
        leaves_out: what no document keeps its labels with beside this method -> the sentence that says so; see ``compose``.
        lives_on: what it does nothing at all without -> the sentence that says so. Both may be set by an instance,
            where its arguments decide.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = ("align", "instruct")
    loss_keys: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[dict[str, str]] = {}
    warns: ClassVar[dict[str, str]] = {}
    leaves_out: Mapping[str, str] = {}
    lives_on: Mapping[str, str] = {}
    _given: Mapping[str, Any] = {}

    def __new__(cls, *args: Any, **kwargs: Any):
        """Remember the arguments, for ``repr``."""
        made = super().__new__(cls)
        with contextlib.suppress(TypeError):  # __init__ says what is wrong with them
            bound = inspect.signature(cls.__init__).bind_partial(made, *args, **kwargs).arguments
            made._given = {key: value for key, value in bound.items() if value is not made}
        return made

    def __repr__(self) -> str:
        """The call that makes it again: checkpoints and logs name a method by this."""
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._given.items())})"

    def is_off(self) -> bool:
        """Whether the arguments switch the method off: then it does no work and attaches no head."""
        return False

    def use(self, dataset: Any, duration: str | None) -> None:
        """What the method does to the training data before anything is read, such as how its streams are mixed.

        Called by ``--check``; a method that has something to do calls it in ``before_load``.

        Args:
            dataset: a ``data.streaming.StreamingVLMDataset``.
            duration: of the training, in Composer's notation.

        Raises:
            UserError: the data is none for this method.
        """

    def about(self, model: VisionLanguageModel) -> str | None:
        """One line on what the method made of its arguments (after INIT), printed before training; None: nothing."""
        return None

    def match(self, event: Event, state: State) -> bool:
        """Events whose handler the subclass has; none when the method is off."""
        return not self.is_off() and (event == Event.AFTER_BACKWARD or self._handler(event) is not None)

    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        """Run the event's handler inside the run's precision context."""
        model = unwrap(state.model)
        handler = self._handler(event)
        if handler is not None:
            with get_precision_context(state.precision, state.precision_config), model.net.autocast():
                handler(model, state, logger)
        if event == Event.AFTER_BACKWARD:
            model.end_step()
        return None

    def _handler(self, event: Event) -> Callable[[VisionLanguageModel, State, Logger], Any] | None:
        return getattr(self, _HANDLERS[event], None) if event in _HANDLERS else None

    def attach(self, state: State, make: Callable[[], nn.Module], **group: Any) -> nn.Module:
        """Add this method's head to the model; the only way to do so. Call it in ``init``.

        The head is built by ``make`` with the random state seeded by (run seed, method name), so that it is
        the same on all ranks, with or without other methods, and nothing else changes; on the model's
        device; sharded on its own; and its parameters reach the optimizer once, as one group.

        Args:
            state: Composer's state.
            make: builds the head.
            group: options of the optimizer group (``lr``, ``weight_decay``); None: those of the run
                (``lr_by_part.auxiliary``, else the optimizer's own).

        Returns:
            the head, reachable as ``model.net.auxiliary[name]``; the same one when called again.
        """
        model = unwrap(state.model)
        if self.name in model.net.auxiliary:
            return model.net.auxiliary[self.name]
        from ..data.schema import stable_hash

        reference = next(model.net.hf.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash("head", state.rank_zero_seed, self.name))
            head = make()
        if self.name in model.saved_heads:
            try:
                head.load_state_dict(model.saved_heads.pop(self.name))
            except RuntimeError as error:
                raise UserError(
                    f"algorithms.{self.name}: the head of the run that this one starts from has another shape; set "
                    f"init_from.heads: new ({str(error).splitlines()[-1].strip()})"
                ) from error
        head.to(reference.device)
        compile_head(model, head)
        head._fsdp_wrap = True  # type: ignore[assignment]
        model.net.auxiliary[self.name] = head
        if state.optimizers:
            options = {**model.head_options, **{k: v for k, v in group.items() if v is not None}}
            parameters = [p for p in head.parameters() if p.requires_grad]
            state.optimizers[0].add_param_group({"params": parameters, "part": "auxiliary", **options})
        return head

    def restore(self, model: VisionLanguageModel, seed: int = 0) -> nn.Module:
        """What this method needs outside a Trainer to look at a finished model: its trained head, usually.

        Raises:
            UserError: the method has none, or the model was trained without it.
        """
        raise UserError(f"{self.name} leaves nothing beside the model itself")

    def take_over(self, model: VisionLanguageModel, make: Callable[[], nn.Module]) -> nn.Module:
        """Trained head of a finished model, outside a Trainer; ``model.saved_heads`` has the weights.

        Raises:
            UserError: the model was trained without this method, or with another head.
        """
        if self.name not in model.saved_heads:
            raise UserError(
                f"this model has no head of {self.name}: it was trained without, or exported for use"
            )
        head = make()
        try:
            head.load_state_dict(model.saved_heads[self.name])
        except RuntimeError as error:
            raise UserError(
                f"the stored head of {self.name} has another shape: {str(error).splitlines()[-1]}"
            ) from error
        device = next(model.net.hf.parameters()).device
        model.net.auxiliary[self.name] = head.to(device).eval()
        return head

    def freeze(self, state: State, parameters: Sequence[nn.Parameter]) -> None:
        """Stop training some parameters: no gradient, out of the optimizer. Call it in ``init``, before any wrapping."""
        chosen = {id(p) for p in parameters}
        for parameter in parameters:
            parameter.requires_grad_(False)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.param_groups[:] = [g for g in optimizer.param_groups if g["params"]]


def unwrap(model: Any) -> VisionLanguageModel:
    """The VisionLanguageModel inside a data-parallel wrapper.

    Raises:
        UserError: it is some other model.
    """
    inner = getattr(model, "module", model)
    if not isinstance(inner, VisionLanguageModel):
        raise UserError(
            f"Opsin's methods act on opsin.models.vlm.VisionLanguageModel, not {type(inner).__name__}"
        )
    return inner


def agree(flag: bool, device: torch.device | None = None) -> bool:
    """True on all ranks if it is True on any: what steers a run must be the same everywhere."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    if device is None:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
