"""A callback that shows, while training, what JARVIS predicts of the hidden blocks of a few held-out pictures."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ...models.errors import UserError
from ...models.vlm import VisionLanguageModel
from ..picture_strips import PictureStrips
from .cut import CODE
from .functional import compared
from .jarvis import JARVIS
from .sampler import BLOCKS, CONTEXT, MOST_BLOCKS

SEED = 0
"""Of the masks: they stay the same at all intervals, and from run to run."""

TINT, DARK, FAINT, EDGE = 0.45, 0.25, 0.3, 0.6
"""Shares: of its colour in a block, of the picture in unused patches, of the colour in visible patches of a map, of
black in the outline of what is hidden there."""

COLOURS = torch.tensor([colorsys.hsv_to_rgb((0.02 + 0.38 * i) % 1, 0.85, 1.0) for i in range(MOST_BLOCKS)])
"""Of target blocks, (blocks, 3) in [0, 1]; neighbours in this list are far apart."""


@dataclass(frozen=True)
class Palette:
    """Colours of features: their first three principal components, one a channel.

    Attributes:
        mean: (C,) float64.
        directions: (C, 3) float64, of length 1; zeros where there are fewer than three.
        low, high: (3,) float64, the components' 2nd and 98th percentile.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> Palette:
        """From features (n, C). Their mean is taken away, since it is most of what they have in common.

        A direction's sign is free; its largest entry is made positive, so that the same features get the same colours.
        """
        values = features.double().cpu()
        mean = values.mean(0)
        centred = values - mean
        found = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]
        largest = found.gather(0, found.abs().argmax(0, keepdim=True))
        directions = F.pad(found * largest.sign(), (0, 3 - found.shape[1]))
        low, high = torch.quantile(
            centred @ directions, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0
        )
        return cls(mean, directions, low, high)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features (n, C) -> colours (n, 3) float32 in [0, 1]; grey in a channel that tells nothing apart."""
        span = self.high - self.low
        tells = span > 1e-6 * self.mean.norm().clamp(min=1e-12)
        found = ((features.double().cpu() - self.mean) @ self.directions - self.low) / span.where(tells, 1.0)
        return found.where(tells, 0.5).clamp(0, 1).float()


class JARVISPictures(PictureStrips[JARVIS]):
    """Show predictions at hidden blocks of fixed held-out pictures, always the same blocks, at intervals and at the end.

    Columns: picture as the tower saw it; its blocks (context as it is, unused patches dark, each target block in a
    colour of its own); the target's features, of which the first three principal components are red, green and blue;
    the predictions in the same colours, with the target's own features, pale, where nothing is hidden. Views that no
    mask fits on are left out. With ``masks: none`` there are no blocks, and every patch is predicted.

    Args:
        remote: dataset with the pictures (its first samples are shown); not one that is trained on.
        images: how many samples.
        interval: between strips, in Composer's notation (``100ba``, ``0.1dur`` is not taken).
        side: pixels of a picture in the strip.
        folder: where strips are written; default: ``jarvis_pictures`` beside the stage's checkpoints.
    """

    method = JARVIS
    key = "jarvis_pictures"
    image_name = "jarvis/prediction"
    folder_name = "jarvis_pictures"

    _palette: Palette
    _features: torch.Tensor
    _kept: dict[str, list[torch.Tensor]]

    def enter(self, algorithm: JARVIS, model: VisionLanguageModel, device_batch: dict[str, Any]) -> None:
        """Mask every view, whatever the run's seed and ``ntp_probability``."""
        algorithm.enter(device_batch, always=True, seed=SEED)

    def prepare(self, algorithm: JARVIS, model: VisionLanguageModel, batch: dict[str, Any]) -> None:
        """Compute the target once, choose colours by it, and draw what never changes.

        Raises:
            UserError: no mask fits on any of the views.
        """
        views, grids = batch["jarvis/views"], batch["grids"]
        if not views:
            sizes = " and ".join(f"{rows}x{columns}" for rows, columns in sorted(set(grids)))
            raise UserError(
                f"callbacks.{self.key}.remote: the first samples of {self.remote} are pictures of {sizes} patches, on which "
                "no blocks fit; use larger pictures"
            )
        # As the loss compares them: a cosine knows no length.
        self._features = compared(algorithm.features(model, batch), algorithm.loss).cpu()
        self._palette = Palette.of(self._features)
        pictures = [model.pictures(batch)[i].float().cpu() for i in views]
        sizes = [shown_size(picture, self.side) for picture in pictures]
        codes = batch[CODE].cpu().split([rows * columns for rows, columns in grids])
        maps = self._maps(self._palette(self._features), batch)
        self._kept = {"picture": pictures}
        if algorithm.masks is not None:
            self._kept["blocks"] = [
                blocks_shown(picture, codes[i].view(grids[i]), size)
                for i, picture, size in zip(views, pictures, sizes, strict=True)
            ]
        self._kept["target"] = [enlarged(m, s) for m, s in zip(maps, sizes, strict=True)]

    def draw(
        self, model: VisionLanguageModel, algorithm: JARVIS, batch: dict[str, Any]
    ) -> dict[str, list[torch.Tensor]]:
        """Picture, its blocks, the target, what is predicted."""
        algorithm.ask(model, batch)
        model(batch)
        predicted = algorithm.predictions(model, batch).float()
        if algorithm.loss == "cosine":  # of the other loss, predictions have a length of their own
            predicted = compared(predicted, algorithm.loss)
        at = batch["jarvis/among"].cpu()
        hidden = torch.zeros(len(self._features), dtype=torch.bool)
        hidden[at] = True
        features = self._features.index_copy(0, at, predicted.cpu())
        colours = self._palette(features)
        colours = torch.where(hidden[:, None], colours, 1 - FAINT * (1 - colours))
        shown = [
            outlined(enlarged(m, target.shape[1:]), enlarged(h, target.shape[1:])[0])
            for m, h, target in zip(
                self._maps(colours, batch), self._maps(hidden[:, None], batch), self._kept["target"], strict=True
            )
        ]  # fmt: skip
        return {**self._kept, "predicted": shown}

    def _maps(self, values: torch.Tensor, batch: dict[str, Any]) -> list[torch.Tensor]:
        """Values (P', n) of the patches of all views with targets -> (n, rows, columns) each."""
        grids = [batch["grids"][i] for i in batch["jarvis/views"]]
        parts = values.split([rows * columns for rows, columns in grids])
        return [part.T.unflatten(1, grid) for part, grid in zip(parts, grids, strict=True)]


def shown_size(picture: torch.Tensor, side: int) -> tuple[int, int]:
    """Height and width of a picture (3, h, w) whose longer side becomes ``side``: lines drawn at it stay one pixel."""
    scale = side / max(picture.shape[1:])
    return max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[2] * scale))


def enlarged(values: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Values of patches (n, rows, columns) -> (n, h, w), each the value of the patch that it lies in."""
    row, column = (torch.arange(s) * g // s for s, g in zip(size, values.shape[1:], strict=True))
    return values[:, row][:, :, column]


def edge(inside: torch.Tensor) -> torch.Tensor:
    """The outermost pixels of regions (n, h, w) bool; the picture's own edge ends a region too."""
    around = F.pad(inside, (1, 1, 1, 1))
    inner = around[:, :-2, 1:-1] & around[:, 2:, 1:-1] & around[:, 1:-1, :-2] & around[:, 1:-1, 2:]
    return inside & ~inner


def outlined(picture: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """A map (3, h, w) with a thin line around what is hidden (h, w) bool; without one if that is everything."""
    line = edge(hidden[None]) & ~hidden.all()
    return torch.where(line, picture * (1 - EDGE), picture)


def blocks_shown(picture: torch.Tensor, code: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A picture (3, h, w) with its masks (rows, columns) int16, codes as in ``sampler``: (3, *size) in [0, 1].

    Where blocks overlap, their colours mix and both their outlines run through.
    """
    shown = F.interpolate(picture[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(
        0, 1
    )
    code = enlarged(code[None], size)
    inside = ((code >> torch.arange(MOST_BLOCKS, dtype=torch.int16)[:, None, None]) & 1).bool()
    count = inside.sum(0)
    tint = torch.einsum("khw,kc->chw", inside.float(), COLOURS) / count.clamp(min=1)
    shown = torch.where(count > 0, (1 - TINT) * shown + TINT * tint, shown)
    unused = (code & (BLOCKS | CONTEXT)) == 0
    shown = torch.where(unused, DARK * shown, shown)
    for line, colour in zip(edge(inside), COLOURS, strict=True):
        shown = torch.where(line, colour[:, None, None], shown)
    return shown
