"""ROSS as a Composer algorithm: a loss on what the language model's visual outputs say about the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from composer.core import State
from composer.loggers import Logger
from torch import nn

from ...data.patch_targets import COLUMN, STORED
from ...data.schema import stable_hash
from ...models.errors import UserError, nearest
from ...models.net import nan_safe_zero, silenced
from ...models.normalise import declare, term
from ...models.randomness import keys_of_views
from ...models.step import FINAL
from ...models.vlm import VisionLanguageModel
from ..partners import ALONE, FOUND, PATCHES, VIEWS, shuffle
from ..predicts import PredictsTarget
from .diffusion import TIMESTEPS, objective_named
from .functional import (
    decoded_loss,
    draw_noise,
    mean_of_views,
    posterior_noise,
    reconstruction_loss,
)
from .heads import DENOISERS, HEADS, make_head
from .targets import Target, check_target, make_target
from .views import Views

FLUX = {"name": "vae", "path": "black-forest-labs/FLUX.1-dev", "subfolder": "vae"}
"""The paper's target."""

LETTERBOX = ("reconstruct", "mask")


class ROSS(PredictsTarget):
    """Reconstruct each image's latent tokens from the language model's outputs at its visual tokens.

    Source: arXiv 2410.09575. Adds ``loss/train/ross``: the mean over views (grids of patches; an image of LLaVA-NeXT
    has two) of the mean over their patches. Target and objective are chosen apart; the paper's variants are

    ==================  ===========  =============  ========
    variant             target       objective      head
    ==================  ===========  =============  ========
    ROSS (D-Latent)     vae          epsilon        dit
    R-Pixel             pixels       mse            mlp
    R-Latent            vae          cosine         mlp
    R-Latent2Pixel      vae          decoded_mse    mlp
    ==================  ===========  =============  ========

    Args:
        weight: of the loss (paper: 1). 0: off.
        target: a name (``vae``, ``vq``, ``features``, ``pixels``, ``autoencoder``) or a mapping with ``name`` and
            that target's keywords; see ``targets``.
        objective: see ``diffusion.OBJECTIVES``.
        head: ``dit`` (the paper's code), ``vit`` (its figure), ``linear`` or ``mlp``; default: dit for objectives
            that denoise, else mlp.
        depth: blocks of a denoiser (paper: 3), layers of ``mlp`` (2).
        width: of a denoiser; default: the paper's for this depth (1024); ``scaled``: in the paper's proportion to the
            language model.
        mlp_ratio: of a denoiser.
        position_grid: rows and columns of the table of positions that ``vit`` learns.
        layer: whose output is the condition: -1 (after the final norm, the paper's), or 1 .. N.
        draws: noisy copies an image (paper's K: 4), each with its own time and noise.
        timesteps: T of the schedule.
        detach: leave the language model alone: the head learns to read it, nothing more. A control.
        lr: of the head; default: ``lr_by_part.auxiliary``, else the optimizer's (paper: 1e-4 in align).
        letterbox: what processors padded: ``reconstruct`` it (paper), or ``mask`` patches whose centre lies there.
        min_visible: a view of which another method left fewer patches visible adds nothing.
        stored: targets that the dataset brings along (``opsin data latents``): ``auto`` takes them, ``required``
            stops without them, ``ignore`` computes them anyway.
        shuffle_targets: reconstruct another picture of the micro-batch, the next one with the same grid of patches. A
            placebo, no method: which picture that is depends on the micro-batch. A view without such a picture adds
            nothing (and still counts as one).
    """

    name: ClassVar[str] = "ross"
    loss_keys: ClassVar[tuple[str, ...]] = ("ross",)
    needs: ClassVar[frozenset[str]] = frozenset({"images"})

    def __init__(
        self,
        weight: float = 1.0,
        target: str | dict[str, Any] | None = None,
        objective: str = "epsilon",
        head: str | None = None,
        depth: int | None = None,
        width: int | str | None = None,
        mlp_ratio: float = 4.0,
        position_grid: tuple[int, int] = (27, 27),
        layer: int = FINAL,
        draws: int = 4,
        timesteps: int = TIMESTEPS,
        detach: bool = False,
        lr: float | None = None,
        letterbox: str = "reconstruct",
        min_visible: int = 10,
        stored: str = "auto",
        shuffle_targets: bool = False,
    ):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"algorithms.ross.weight: {weight}: use 0 (off) or more")
        if lr is not None and not (math.isfinite(lr) and lr > 0):
            raise UserError(f"algorithms.ross.lr: {lr}: use a rate above 0, or null for the run's")
        for key, value in (("draws", draws), ("timesteps", timesteps), ("min_visible", min_visible)):
            if value < 1:
                raise UserError(f"algorithms.ross.{key}: {value} is less than 1")
        _one_of("letterbox", letterbox, LETTERBOX)
        _one_of("stored", stored, STORED)
        self.weight = float(weight)
        self.target_spec: str | Mapping[str, Any] = FLUX if target is None else target
        check_target(self.target_spec)
        self.objective = objective_named(objective)
        self.head = head or ("dit" if self.objective.noisy else "mlp")
        _one_of("head", self.head, HEADS)
        if self.objective.noisy != (self.head in DENOISERS):
            fit = "dit or vit" if self.objective.noisy else "linear or mlp"
            raise UserError(f"algorithms.ross.head: objective '{objective}' needs {fit}, not '{self.head}'")
        if layer == 0 or layer < FINAL:
            raise UserError(f"algorithms.ross.layer: {layer}: use -1 (after the final norm) or 1 .. N")
        self.depth = depth if depth is not None else (3 if self.head in DENOISERS else 2)
        if self.objective.decoded and stored == "required":
            raise UserError(
                "algorithms.ross.stored: decoded_mse compares pictures, it has no use for stored targets"
            )
        if self.depth < 1:
            raise UserError(f"algorithms.ross.depth: {depth} is less than 1")
        self.width, self.mlp_ratio, self.layer = width, float(mlp_ratio), layer
        self.position_grid = (int(position_grid[0]), int(position_grid[1]))
        if min(self.position_grid) < 1:
            raise UserError(
                f"algorithms.ross.position_grid: {list(position_grid)} has less than one row or column"
            )
        self.draws, self.timesteps, self.detach, self.lr = draws, timesteps, detach, lr
        self.letterbox, self.min_visible, self.stored = letterbox, min_visible, stored
        self.shuffle_targets = shuffle_targets
        if shuffle_targets:
            self.warns = ALONE  # type: ignore[misc]
        self._seed = 0
        self._shares = torch.empty(0)

    def is_off(self) -> bool:
        """At weight 0 nothing is done and no head attached."""
        return self.weight == 0

    def init(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Build the target and attach the head."""
        self.attach(state, self.prepare(model, state.rank_zero_seed), lr=self.lr)

    def about(self, model: VisionLanguageModel) -> str:
        """Head, its size, and target."""
        head = model.net.auxiliary[self.name]
        width = getattr(head, "width", None)
        return (
            f"{self.head}{f' of width {width}' if width else ''}, {sum(p.numel() for p in head.parameters()):,} "
            f"parameters, objective {self.objective.name}; target {self.built_target.identity}"
        )

    def prepare(self, model: VisionLanguageModel, seed: int) -> Callable[[], nn.Module]:
        """Build the target; the function that makes the head for it.

        Raises:
            UserError: target, objective and model do not fit.
        """
        layers = len(model.anatomy.decoder_layers(model.hf))
        if self.layer > layers:
            raise UserError(
                f"algorithms.ross.layer: {self.layer}: the language model has layers 1 to {layers}"
            )
        target = make_target(self.target_spec)
        self.set_target(target)
        if self.objective.decoded and type(target).decode is Target.decode:
            raise UserError(
                f"algorithms.ross.objective: decoded_mse needs a target with a decoder, {target.identity} has none"
            )
        self._seed = stable_hash(self.name, seed)
        self._shares = self.objective.shares(self.timesteps).float()
        return partial(
            make_head,
            self.head,
            model.hf.config.get_text_config().hidden_size,
            target.dim,
            depth=self.depth,
            width=self.width,
            mlp_ratio=self.mlp_ratio,
            position_grid=self.position_grid,
        )

    def restore(self, model: VisionLanguageModel, seed: int = 0) -> nn.Module:
        """Target and trained head for a finished model, outside a Trainer; ``model.saved_heads`` has the weights.

        Raises:
            UserError: the model was not trained with ROSS, or with another head.
        """
        head = self.take_over(model, self.prepare(model, seed))
        self._shares = self._shares.to(next(model.net.hf.parameters()).device)
        return head

    def fit_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Check the targets that the dataset brings."""
        self._shares = self._shares.to(next(model.net.hf.parameters()).device)
        self.look_for_stored(state)

    def batch_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Declare the number of views."""
        batch = state.batch
        if self.shuffle_targets:
            shuffle(batch)
        refused = batch["refused"][batch["view_row"], batch["view_document"]]
        declare(batch, self.name, (~refused).sum(), "views")

    def before_forward(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Ask for the layer that is the condition."""
        model.step(state.batch).taps.add(self.layer)

    def after_loss(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Add the loss of this micro-batch."""
        hidden = model.step(state.batch).tapped[self.layer]
        if self.detach:
            hidden = hidden.detach()
        local = self.local_loss(model, state.batch, hidden)
        losses: Any = state.loss
        losses[self.name] = self.weight * term(local, self.name, state.batch)

    def local_loss(
        self,
        model: VisionLanguageModel,
        batch: dict[str, Any],
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """Sum over the views of a micro-batch of the mean loss of their patches: a scalar.

        Args:
            model: with this method's head.
            batch: a micro-batch on the model's device.
            hidden: (B, L, D).
        """
        head = model.net.auxiliary[self.name]
        grids = batch["grids"]
        if not grids:
            return self._idle(head, hidden)
        views, used = self.views(model, batch)
        condition = hidden.flatten(0, 1)[batch["patch_position"]]
        if self.objective.decoded:
            target, pictures = self.placed_target(hidden.device), model.pictures(batch)
            if self.shuffled(batch):
                pictures = [pictures[i] for i in batch[VIEWS]]
            loss = decoded_loss(head, condition, pictures, grids, views, target)
        else:
            key = self.keys(batch)
            target = self.targets(model, batch, views, key)
            if self.shuffled(batch):
                target = target[batch[PATCHES]]
            draws = None
            if self.objective.noisy:
                draws = draw_noise(key, views, self.draws, self.built_target.dim, self.timesteps)
            loss = reconstruction_loss(head, condition, target, views, self.objective, draws, self._shares)
        return mean_of_views(loss, views, len(grids), self._counted(batch, views), used)

    def views(self, model: VisionLanguageModel, batch: dict[str, Any]) -> tuple[Views, torch.Tensor]:
        """Views of a micro-batch, without what another method hid; and which of them are used, (V,) bool."""
        grids = batch["grids"]
        hidden = model.step(batch).hidden
        visible = None if hidden is None else ~hidden.flatten()[batch["patch_position"]]
        views = Views.of(grids, batch["patch_position"].device, visible)
        used = ~batch["refused"][batch["view_row"], batch["view_document"]]
        if visible is not None:
            seen = torch.zeros(len(grids), dtype=torch.int64, device=visible.device)
            seen = seen.index_add(0, views.view, visible.long())
            patches = batch["view_grid"].prod(1)
            used = used & ((seen == patches) | (seen >= self.min_visible))
        if self.shuffled(batch):
            used = used & batch[FOUND]
        return views, used

    def keys(self, batch: dict[str, Any], seed: int | None = None) -> torch.Tensor:
        """Key of each view's randomness, (V,) int64; ``seed``: instead of the run's."""
        return keys_of_views(self._seed if seed is None else seed, batch)

    def targets(
        self, model: VisionLanguageModel, batch: dict[str, Any], views: Views, key: torch.Tensor
    ) -> torch.Tensor:
        """What is to be reconstructed, (P, C) float32: stored with the data, or computed now."""
        stored = batch.get(COLUMN) if self._take_stored else None
        with torch.no_grad(), torch.autocast(views.view.device.type, enabled=False):
            if stored is None:
                moments = self.placed_target(key.device).moments(model.pictures(batch), batch["grids"])
            else:
                moments = stored.float()
            target = self.built_target
            return target.draw(moments, posterior_noise(key, views, target.dim) if target.draws else None)

    def shuffled(self, batch: dict[str, Any]) -> bool:
        """Whether a micro-batch is held against other pictures: with ``shuffle_targets``, and only while training."""
        return self.shuffle_targets and PATCHES in batch

    def _counted(self, batch: dict[str, Any], views: Views) -> torch.Tensor | None:
        counted = views.visible
        if self.letterbox == "mask":
            box = batch["view_box"][views.view]
            x = box[:, 0] + (box[:, 2] - box[:, 0]) * (views.column + 0.5) / views.extent[:, 1]
            y = box[:, 1] + (box[:, 3] - box[:, 1]) * (views.row + 0.5) / views.extent[:, 0]
            inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
            if self.shuffled(batch):
                inside = inside[batch[PATCHES]]
            counted = inside if counted is None else counted & inside
        return counted

    def _idle(self, head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """No view in this micro-batch: run the head on one row all the same, as a zero."""
        views = Views.of([(1, 1)], hidden.device)
        noisy = torch.zeros(1, 1, self.built_target.dim, device=hidden.device)
        time = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
        return nan_safe_zero(head(silenced(hidden.flatten(0, 1)[:1]), views, noisy, time))


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"algorithms.ross.{key} '{value}': unknown{nearest(str(value), known)}")
