"""Methods that exist for tests: one with a head and a loss of its own, ones that never count as off, one that hides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import torch
from composer.core import Algorithm, Event
from torch import nn

from opsin.algorithms.base import VisionAlgorithm, unwrap
from opsin.algorithms.l2t import L2T
from opsin.algorithms.ross import ROSS
from opsin.data.batch import split_batch
from opsin.data.collate import VLMCollator
from opsin.models.net import nan_safe_zero, silenced
from opsin.models.normalise import declare, term
from opsin.models.step import FINAL
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo


class NeverOffL2T(L2T):
    """Runs its whole code at weight 0, where the real one does nothing."""

    def is_off(self) -> bool:
        return False


class Read(nn.Module):
    """A linear read-out of visual hidden states."""

    def __init__(self, width: int):
        super().__init__()
        self.line = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(x)


class MeanColour(VisionAlgorithm):
    """Predicts the mean colour of each patch from the language model's output: head, tap, own loss, own count."""

    name: ClassVar[str] = "mean_colour"
    loss_keys: ClassVar[tuple[str, ...]] = ("mean_colour",)
    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    def __init__(self, weight: float = 1.0, layer: int = FINAL, lr: float | None = None):
        self.weight, self.layer, self.lr = weight, layer, lr

    def is_off(self) -> bool:
        return self.weight == 0

    def init(self, model: Any, state: Any, logger: Any) -> None:
        width = model.hf.config.get_text_config().hidden_size
        self.attach(state, lambda: Read(width), lr=self.lr)

    def batch_start(self, model: Any, state: Any, logger: Any) -> None:
        declare(state.batch, self.name, state.batch["view_grid"].prod(1).sum())

    def before_forward(self, model: Any, state: Any, logger: Any) -> None:
        model.step(state.batch).taps.add(self.layer)

    def after_loss(self, model: Any, state: Any, logger: Any) -> None:
        batch, step = state.batch, model.step(state.batch)
        hidden, head = step.tapped[self.layer], model.net.auxiliary[self.name]
        positions = batch["patch_position"]
        if len(positions) == 0:
            local = nan_safe_zero(head(silenced(hidden.flatten(0, 1)[:1])))
        else:
            pictures = [
                p.unflatten(1, (g[0], -1)).unflatten(3, (g[1], -1))
                for p, g in zip(model.pictures(batch), batch["view_grid"].tolist(), strict=True)
            ]
            target = torch.cat([p.mean((2, 4)).flatten(1).T for p in pictures])
            local = (head(hidden.flatten(0, 1)[positions]) - target).square().sum()
        state.loss[self.name] = self.weight * term(local, self.name, batch)


def loud(head: nn.Module, seed: int = 7) -> nn.Module:
    """Random weights everywhere: a denoiser's last layers start at zero, and then no gradient reaches anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return head


class LoudROSS(ROSS):
    """ROSS that pulls at the language model from the first step on; runs its whole code at weight 0 too."""

    def is_off(self) -> bool:
        return False

    def init(self, model: Any, state: Any, logger: Any) -> None:
        super().init(model, state, logger)
        loud(model.net.auxiliary[self.name])


class Loud(Algorithm):
    """Named last: makes every head loud that the methods before it attached, so that all of them pull from the first step."""

    def match(self, event: Event, state: Any) -> bool:
        return event == Event.INIT

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        for head in unwrap(state.model).net.auxiliary.values():
            loud(head)


class Refuse(VisionAlgorithm):
    """Refuses some documents, as a guard does; no loss of its own.

    Args:
        uids: of the documents.
    """

    name: ClassVar[str] = "refuse"

    def __init__(self, uids: tuple[int, ...]):
        self.uids = torch.tensor(uids)

    def after_dataloader(self, model: Any, state: Any, logger: Any) -> None:
        batch = state.batch
        batch["refused"] = batch["refused"] | torch.isin(batch["document_uid"], self.uids)


class Hide(VisionAlgorithm):
    """Takes away what the language model sees at some patches, as masked modelling does; no loss of its own.

    Args:
        every: of the patches along a diagonal, hide each this many-th.
        shift: what is added to the embeddings there.
    """

    name: ClassVar[str] = "hide"

    def __init__(self, every: int = 3, shift: float = 0.0):
        self.every, self.shift = every, shift

    def before_forward(self, model: Any, state: Any, logger: Any) -> None:
        batch = state.batch
        chosen = (batch["patch_row"] + batch["patch_column"]) % self.every == 0
        hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        hidden.view(-1)[batch["patch_position"][chosen]] = True
        step = model.step(batch)
        step.hide(hidden)
        step.edits[self.name] = lambda e: e + self.shift * hidden[..., None].to(e.dtype)


def teacher() -> dict[str, Any]:
    """A small frozen network, random and the same everywhere, as a target of JARVIS."""
    colours = {"mean": [0.5] * 3, "std": [0.25] * 3}
    return {"name": "features", "timm": "test_vit", "weights": None, **colours}


class Bench:
    """A tiny model with a method, driven event by event without a Trainer: the method's own loss and gradients."""

    def __init__(
        self,
        method: VisionAlgorithm,
        family: str = "llava",
        *,
        also: tuple[Any, ...] = (),
        size: int = 16,
        bidirectional: bool = False,
        template: str = "vicuna_v1",
        max_seq_len: int = 400,
    ):
        built = zoo.build(family, seed=1, size=size)
        self.method, self.also = method, also
        self.collator = jobs.collator(built, template, max_seq_len)
        self.model = VisionLanguageModel(built.hf, built.processor, bidirectional_images=bidirectional)
        loader = SimpleNamespace(collate_fn=self.collator, dataset=None)
        self.state: Any = SimpleNamespace(
            model=self.model, optimizers=[], rank_zero_seed=3, train_dataloader=loader, dataloader=loader,
            timestamp=SimpleNamespace(batch=0),
        )  # fmt: skip
        self.logger: Any = MagicMock()
        for event in ("init", "fit_start"):
            self._tell(event)

    def _tell(self, event: str) -> None:
        for method in (self.method, *self.also):
            if hasattr(method, event):
                with self.model.net.autocast():
                    getattr(method, event)(self.model, self.state, self.logger)

    def batch(self, samples: list[dict], **options: Any) -> dict[str, Any]:
        """A device batch; options of the collator."""
        return VLMCollator(self.collator.encoder, **options)(samples)

    def parts(self, batch: dict[str, Any], size: int | None = None) -> list[dict[str, Any]]:
        """Its micro-batches."""
        self.state.batch = dict(batch)
        self._tell("batch_start")
        return split_batch(self.state.batch, size)

    def step(self, batch: dict[str, Any], size: int | None = None) -> tuple[float, dict[str, torch.Tensor]]:
        """The method's loss in one step, and gradients by name of parameter (those that it moves)."""
        self.model.zero_grad()
        parts, total = self.parts(batch, size), 0.0
        for part in parts:
            self.state.batch, self.state.loss = part, {}
            self._tell("before_forward")
            self.model(part)
            self._tell("after_loss")
            loss = self.state.loss[self.method.name] / len(parts)
            loss.backward()
            total += float(loss)
            self.model.end_step()
        found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return total, {n: g for n, g in found.items() if bool(g.any())}
