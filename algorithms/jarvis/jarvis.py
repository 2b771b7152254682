"""JARVIS as a Composer algorithm: hide blocks of the image, and let early layers predict what was there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

from ...data.batch import CUT
from ...data.patch_targets import COLUMN
from ...data.schema import stable_hash
from ...models.anatomy import image_encoder_for
from ...models.attention import Visibility
from ...models.errors import UserError
from ...models.net import nan_safe_zero, silenced
from ...models.normalise import declare, term
from ...models.randomness import keys, keys_of_views, uniform
from ...models.step import Branch
from ...models.vlm import VisionLanguageModel
from ..partners import ALONE
from ..predicts import PredictsTarget
from .cut import CODE, WEIGHT, cut
from .functional import (
    attention_terms,
    on_tokens,
    prediction_losses,
    target_weights,
    weighted_sum,
)
from .heads import JarvisHead, LatentToken
from .options import SEEN_WHOLE, check_options
from .sampler import BLOCKS, MASKED, fits, mask_config, sample_masks
from .targets import check_target, make_target

_MASK, _COIN, _BATCH = 0, 1, 2
"""Streams of random numbers."""

_TRIED = 512
"""Side in pixels of the picture by which the model's grid is looked at."""


class JARVIS(PredictsTarget):
    """Predict the features of hidden blocks of an image from the rest of it, inside the language model.

    Source: arXiv 2512.15885. Visual tokens of target blocks are replaced by one learnt vector; visual tokens see
    nothing but the context block and their own target block; the output of an early layer at the targets is compared
    with a frozen vision model's features. Adds ``loss/train/jarvis``: the mean over (image, block, position) of the
    whole step.

    Args:
        weight: of the loss (paper's code: 1). 0: off.
        target: what is predicted: a name (``features``, ``tower``) or a mapping with ``name`` and that target's
            keywords; default: DINOv2-L, the paper's. See ``targets``.
        masks: ``default``, ``parity`` (the statistics of the authors' code), ``none`` (nothing is hidden and every patch
            predicted: the control "unmasked alignment"), or a mapping with keywords of ``sampler.MaskConfig`` and,
            if wanted, ``preset``.
        head: ``mlp`` (paper) or ``linear``.
        layer: whose output predictions are read from, 1 .. N; default N // 4, the paper's.
        loss: ``cosine`` (paper) or ``smooth_l1``.
        weighting: ``position`` (paper's code) or ``block``; see ``functional.target_weights``.
        text_loss: ``masked``: one pass, words are predicted from the masked image (paper, which has captions alone);
            ``unmasked``: words see the whole image, and masked views run alone through the early layers (no visual
            token ever reads a word, so predictions are the same); ``auto``: masked where the chat template is
            ``plain``, unmasked where there are questions, since answers about hidden blocks teach guessing.
        train: what is trained of the language model, of what the stage's ``trainable`` trains: ``all``; ``proj+early``:
            layers 1 .. ``layer`` alone; ``proj``: nothing (paper's code). Projector and tower go by ``trainable``.
        ntp_probability: share of samples without masks, for which words alone are learnt (paper's ``jepa_lambda``:
            0.2). 1: off.
        ntp_scope: ``sample``: each sample is drawn for itself; ``step``: whole steps are.
        hide_unused: words don't see patches that are neither context nor target (paper's code shows them).
        see_pretext: visual tokens of masked images see the text before them (paper's code: not).
        lr: of latent token and head; default: ``lr_by_part.auxiliary``, else the optimizer's (paper: 1e-3).
        stored: features that the dataset brings along (``opsin data features``): ``auto`` takes them, ``required``
            stops without them, ``ignore`` computes them anyway.
        log_interval: steps between entries ``jarvis/...`` in the log.
        shuffle_targets: predict the features of another picture of the micro-batch, the next one with the same grid of
            patches. A placebo, no method: which picture that is depends on the micro-batch. A view without such a picture
            is left as it is, as samples without masks are (and still counts in the mean and in ``jarvis/views_...``).
    """

    name: ClassVar[str] = "jarvis"
    stages: ClassVar[tuple[str, ...]] = ("align",)
    loss_keys: ClassVar[tuple[str, ...]] = ("jarvis",)
    needs: ClassVar[frozenset[str]] = frozenset({"images", "masks"})
    store_command: ClassVar[str] = "opsin data features"

    def __init__(
        self,
        weight: float = 1.0,
        target: str | dict[str, Any] | None = None,
        masks: str | dict[str, Any] = "default",
        head: str = "mlp",
        layer: int | None = None,
        loss: str = "cosine",
        weighting: str = "position",
        text_loss: str = "auto",
        train: str = "all",
        ntp_probability: float = 0.2,
        ntp_scope: str = "sample",
        hide_unused: bool = False,
        see_pretext: bool = False,
        lr: float | None = None,
        stored: str = "auto",
        log_interval: int = 10,
        shuffle_targets: bool = False,
    ):
        check_options(
            {
                "weight": weight, "head": head, "layer": layer, "loss": loss, "weighting": weighting,
                "text_loss": text_loss, "train": train, "ntp_probability": ntp_probability, "ntp_scope": ntp_scope,
                "lr": lr, "stored": stored, "log_interval": log_interval,
            }
        )  # fmt: skip
        self.masks = mask_config(masks)
        if self.masks is None:
            self.needs = frozenset({"images"})  # type: ignore[misc]
        if self.masks is None and (hide_unused or see_pretext):
            key = "hide_unused" if hide_unused else "see_pretext"
            raise UserError(f"algorithms.jarvis.{key}: there is nothing to hide with masks: none")
        if text_loss == "unmasked" and hide_unused and not see_pretext:
            raise UserError(SEEN_WHOLE)
        self.target_spec: str | Mapping[str, Any] = "features" if target is None else target
        check_target(self.target_spec)
        self.weight, self.loss, self.weighting = float(weight), loss, weighting
        self.head, self.layer, self.train, self.lr = head, layer, train, lr
        self.text_loss, self.stored, self.log_interval = text_loss, stored, log_interval
        self.ntp_probability, self.ntp_scope = float(ntp_probability), ntp_scope
        self.hide_unused, self.see_pretext = hide_unused, see_pretext
        self.shuffle_targets = shuffle_targets
        if shuffle_targets:
            self.warns = ALONE  # type: ignore[misc]
        self.branch = text_loss == "unmasked" and self.masks is not None
        self.tap = layer or 0
        self._seed = 0
        self._sums: torch.Tensor | None = None
        self._views = torch.zeros(3, dtype=torch.float64)

    def is_off(self) -> bool:
        """Off: nothing is hidden, no mask changed, no head attached."""
        return self.weight == 0 or self.ntp_probability == 1

    def init(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Build the target, attach latent token and head, freeze what is not to be trained."""
        self.attach(state, self.prepare(model, state.rank_zero_seed), lr=self.lr)
        if self.train == "all":
            return
        kept: set[int] = set()
        if self.train == "proj+early":
            early = model.anatomy.decoder_layers(model.hf)[: self.tap]
            kept = {id(p) for layer in early for p in layer.parameters()}  # type: ignore[union-attr]
        frozen = [p for p in model.parameters_of(["language_model"]) if p.requires_grad and id(p) not in kept]
        trained = [p for p in model.parameters_of(["language_model"]) if p.requires_grad and id(p) in kept]
        if self.train == "proj+early" and not trained:
            raise UserError(
                "algorithms.jarvis.train: proj+early trains early layers, which the stage freezes; set "
                "trainable.language_model: true"
            )
        self.freeze(state, frozen)

    def prepare(self, model: VisionLanguageModel, seed: int) -> Callable[[], nn.Module]:
        """Build the target; the function that makes the head for it.

        Raises:
            UserError: layer, grid, attention and target do not fit the model.
        """
        layers = len(model.anatomy.decoder_layers(model.hf))
        self.tap = self.layer or max(1, layers // 4)
        if self.tap > layers:
            raise UserError(
                f"algorithms.jarvis.layer: {self.layer}: the language model has layers 1 to {layers}"
            )
        if self.masks is not None:
            self._check_grid(model)
            kind = model.anatomy.decoder(model.hf).config._attn_implementation  # type: ignore[union-attr]
            if kind not in ("sdpa", "eager", "flex_attention"):
                raise UserError(
                    f"algorithms.jarvis: masks need an attention that takes them, not model.attn_implementation: {kind}; "
                    "use sdpa or flex_attention"
                )
        target = make_target(self.target_spec)
        self.set_target(target)
        self._seed = stable_hash(self.name, seed)
        text = model.hf.config.get_text_config()
        deviation = getattr(text, "initializer_range", 0.02)
        return partial(JarvisHead, self.head, text.hidden_size, target.dim, deviation, self.masks is not None)

    def _check_grid(self, model: VisionLanguageModel) -> None:
        """Refuse a model whose patches are too few for blocks (where the grid depends on the picture: for a large one)."""
        if model.processor is None:
            return
        from PIL import Image

        assert self.masks is not None
        shown = image_encoder_for(model.processor, model.hf.config).encode(Image.new("RGB", (_TRIED, _TRIED)))
        grids = sorted({view.grid for view in shown.views})
        if not any(fits(*grid, self.masks) for grid in grids):
            sizes = " and ".join(f"{rows}x{columns}" for rows, columns in grids)
            raise UserError(
                f"algorithms.jarvis.masks: no blocks fit on {sizes} patches, which is what this model makes of a picture; "
                "use a model with 8x8 or more, or masks: none"
            )

    def about(self, model: VisionLanguageModel) -> str:
        """Layer, head, masks, what is trained, target."""
        head = self._head(model)
        images = "bidirectional" if model.net.bidirectional_images else "causal (paper: bidirectional)"
        text = {"auto": "masked with template plain, else unmasked"}.get(self.text_loss, self.text_loss)
        return (
            f"layer {self.tap}, {self.head} head, {sum(p.numel() for p in head.parameters()):,} parameters; "
            f"{'nothing hidden' if self.masks is None else f'text loss {text}'}; images {images}; trains {self.train}; "
            f"target {self.built_target.identity}"
        )

    def restore(self, model: VisionLanguageModel, seed: int = 0) -> nn.Module:
        """Target and trained head for a finished model, outside a Trainer.

        Raises:
            UserError: the model was not trained with JARVIS, or with another head.
        """
        return self.take_over(model, self.prepare(model, seed))

    def fit_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Check the features that the dataset brings; see whether there are questions."""
        self.look_for_stored(state)
        loader: Any = state.train_dataloader
        encoder = getattr(getattr(loader, "collate_fn", None), "encoder", None)
        plain = getattr(getattr(encoder, "template", None), "name", None) == "plain"
        unmasked = self.text_loss == "unmasked" or (self.text_loss == "auto" and not plain)
        self.branch = unmasked and self.masks is not None
        if self.branch and self.hide_unused and not self.see_pretext:
            raise UserError(SEEN_WHOLE)
        logger.log_hyperparameters({"jarvis/text_loss": "unmasked" if unmasked else "masked"})

    def batch_start(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Draw the masks of a device batch (on the CPU), count what the loss is summed over."""
        step = int(state.timestamp.batch) if self._needs_step() else 0
        self.enter(state.batch, step)
        declare(state.batch, self.name, state.batch[WEIGHT].double().sum(), "patches")

    def _needs_step(self) -> bool:
        return self.ntp_scope == "step" or (self.masks is not None and self.masks.size_scope == "batch")

    def enter(
        self, batch: dict[str, Any], step: int = 0, *, always: bool = False, seed: int | None = None
    ) -> None:
        """Write codes and weights of all patches into a device batch, and how a micro-batch is cut.

        Args:
            batch: on the CPU.
            step: of training.
            always: mask every view, whatever ``ntp_probability`` says, and hold it against itself (to look at predictions;
                nothing is counted).
            seed: instead of the run's.
        """
        grid, seed = batch["view_grid"], self._seed if seed is None else seed
        key = keys_of_views(stable_hash(seed, _MASK), batch)
        used = ~batch["refused"][batch["view_row"], batch["view_document"]]
        if not always:
            used &= self._coin(batch, seed, step) >= self.ntp_probability
        view = torch.repeat_interleave(torch.arange(len(grid)), grid.prod(1))
        code = torch.zeros(len(view), dtype=torch.int16)
        if self.masks is None:
            code[used[view]] = MASKED
            weight = used[view].float()
        else:
            drawn = sample_masks(key[used], grid[used], self.masks, keys(seed, _BATCH, step))
            code[used[view]] = drawn
            weight = target_weights(code, view, len(grid), self.weighting)
        batch[CODE], batch[WEIGHT] = code, weight
        batch[CUT + self.name] = partial(
            cut,
            branch=self.branch,
            see_pretext=self.see_pretext,
            shuffle=self.shuffle_targets and not always,
        )
        if always:
            return  # else the log would tell of views that were not trained on
        masked = torch.zeros(len(grid), dtype=torch.bool).index_put_((view,), code != 0, accumulate=False)
        self._views += torch.stack([masked.sum(), (used & ~masked).sum(), (~used).sum()]).double()

    def _coin(self, batch: dict[str, Any], seed: int, step: int) -> torch.Tensor:
        """Uniform number of each view's document, or of the step: (V,) float64."""
        if self.ntp_scope == "step":
            return uniform(keys(seed, _COIN, step)).expand(len(batch["view_row"]))
        row, document = batch["view_row"], batch["view_document"]
        uid, visit = batch["document_uid"][row, document], batch["document_visit"][row, document]
        return uniform(keys(seed, _COIN, uid, visit)).squeeze(-1)

    def _head(self, model: VisionLanguageModel) -> JarvisHead:
        return cast(JarvisHead, model.net.auxiliary[self.name])

    def before_forward(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Say what the pass is to hide, who sees whom, and which output is wanted."""
        self.ask(model, state.batch)

    def ask(self, model: VisionLanguageModel, batch: dict[str, Any]) -> None:
        """Write into the record of a micro-batch what the pass is to do; :meth:`predictions` reads it afterwards."""
        step = model.step(batch)
        if self.masks is None:
            step.taps.add(self.tap)
            return
        latent = cast(LatentToken, self._head(model).latent)  # None only without masks
        if self.branch:
            step.branches[self.name] = self._branch(model, batch, latent)
            return
        shape = batch["input_ids"].shape
        code = on_tokens(batch[CODE], batch["patch_position"], shape, 0)
        hidden = (code & BLOCKS) != 0
        if batch["jarvis/views"]:
            # In 16 bits, since what attention compares is as large as a mask; a row has no 2 ** 16 views.
            scope = on_tokens(batch["patch_view"].short(), batch["patch_position"], shape, -1)
            preceding = (batch["image_ids"] < 0) if self.see_pretext else None
            step.visibility.update(
                attention_terms(code, scope, hide_unused=self.hide_unused, preceding=preceding)
            )
            step.hide(hidden)
        step.edits[self.name] = lambda embeddings: latent(embeddings, hidden)
        step.taps.add(self.tap)

    def _branch(self, model: VisionLanguageModel, batch: dict[str, Any], latent: nn.Module) -> Branch:
        """Masked views alone, one a row, or with what precedes them (``see_pretext``)."""
        positions, code = batch["jarvis/branch"], batch["jarvis/branch_code"]
        at, valid = positions.clamp(min=0), positions >= 0
        image = torch.where(valid, batch["image_ids"].flatten()[at].long(), -1)
        terms = attention_terms(
            code,
            batch["jarvis/branch_view"],
            hide_unused=self.hide_unused,
            preceding=(valid & (image < 0)) if self.see_pretext else None,
        )
        both = image >= 0 if self.see_pretext and model.net.bidirectional_images else None
        see = Visibility(valid, None, None, image, bidirectional=both).with_terms(**terms)
        hidden = (code & BLOCKS) != 0
        return Branch(positions, self.tap, see, lambda embeddings: latent(embeddings, hidden))

    def after_loss(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Add the loss of this micro-batch."""
        batch = state.batch
        losses: Any = state.loss
        predicted = self.predictions(model, batch)
        if not batch["jarvis/views"]:
            local = nan_safe_zero(predicted)
        else:
            each = prediction_losses(predicted, self.targets(model, batch), self.loss)
            local = weighted_sum(each, batch["jarvis/weights"])
            each = each.detach().double()
            weights = torch.where(each.isfinite(), batch["jarvis/weights"].double(), 0.0)
            sums = torch.stack([weighted_sum(each, weights), weights.sum()])
            self._sums = sums if self._sums is None else self._sums + sums
        losses[self.name] = self.weight * term(local, self.name, batch)

    def predictions(self, model: VisionLanguageModel, batch: dict[str, Any]) -> torch.Tensor:
        """Predicted features at the targets of a micro-batch after its forward pass: (n, C); one row where there are none."""
        step, head = model.step(batch), self._head(model)
        if self.branch:
            states, at = step.branched[self.name].flatten(0, 1), batch["jarvis/branch_at"]
        else:
            states, at = step.tapped[self.tap].flatten(0, 1), batch["patch_position"][batch["jarvis/targets"]]
        if not batch["jarvis/views"]:
            return head.predict(silenced(states[:1]))
        return head.predict(states[at])

    def targets(self, model: VisionLanguageModel, batch: dict[str, Any]) -> torch.Tensor:
        """Features at the targets, (n, C) float32: stored with the data, or computed now for views with targets."""
        stored = batch.get(COLUMN) if self._take_stored else None
        if stored is not None:
            return stored[batch["jarvis/sources"]].float()
        return self.features(model, batch)[batch["jarvis/among"]]

    @torch.no_grad()
    def features(self, model: VisionLanguageModel, batch: dict[str, Any]) -> torch.Tensor:
        """Target features of all patches of views that targets are taken from, (P', C) float32."""
        device = batch["patch_position"].device
        views, grids = batch["jarvis/teaching"], batch["grids"]
        pictures = model.pictures(batch)
        with torch.autocast(device.type, enabled=False):
            target = self.placed_target(device)
            return target.moments([pictures[i] for i in views], [grids[i] for i in views])

    def batch_end(self, model: VisionLanguageModel, state: State, logger: Logger) -> None:
        """Log the mean over predictions, counted over steps that have some, and what became of the views."""
        if int(state.timestamp.batch) % self.log_interval:
            return
        device = next(model.net.hf.parameters()).device
        sums = torch.zeros(2, dtype=torch.float64, device=device) if self._sums is None else self._sums
        sums = torch.cat([sums, self._views.to(device)])
        self._sums, self._views = None, torch.zeros(3, dtype=torch.float64)
        dist.all_reduce(sums)
        total, count, masked, whole, without = sums.tolist()
        logged = {
            "jarvis/views_masked": masked, "jarvis/views_too_small": whole, "jarvis/views_without": without,
        }  # fmt: skip
        if count:
            mean = total / count
            logged.update({"jarvis/cosine": -mean} if self.loss == "cosine" else {"jarvis/smooth_l1": mean})
        logger.log_metrics(logged)
