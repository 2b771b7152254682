"""Features of a frozen vision transformer or CNN: a target that cannot be turned back into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from ....models.errors import UserError
from .base import weights_id
from .frozen import WHERE, FrozenTarget, choice, one_line
from .readers import HubReader, TimmReader


class FeatureTarget(FrozenTarget):
    """One feature a patch, of a network that was trained for something else (CLIP, SigLIP, DINOv2 ...).

    Pictures are resized to ``rows * patch`` by ``columns * patch`` and position embeddings are interpolated.
    A network that takes pictures of its own size only gets them so, and its map is moved to the grid bilinearly
    (``fixed`` is True then). Class and register tokens are dropped.

    Args:
        path: folder or hub name of a Hugging Face vision transformer, or of a CLIP or SigLIP as a whole.
        timm: name of a timm network, in place of ``path``.
        weights: with ``timm``: ``timm`` (those that timm knows, from its hub), a file in timm's names, or None
            (random: to measure speed and to test).
        layer: with ``path`` an index into ``hidden_states``, with ``timm`` of a block or stage; negative counts
            from the end. Always before a final norm, as LLaVA reads its tower.
        normalise: ``token``: each feature to mean 0 and deviation 1 over its channels; ``none``.
        mean, std: of a colour, three each; default: what the network's own configuration says.
        antialias: of the resizing.

    Raises:
        UserError: no such network or layer, or its mean and deviation of colours are not known.
    """

    def __init__(
        self,
        path: str | None = None,
        timm: str | None = None,
        weights: str | None = "timm",
        layer: int = -1,
        normalise: str = "token",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        antialias: bool = False,
    ):
        if (path is None) == (timm is None):
            raise UserError(
                f"{WHERE}.path: one of path (a Hugging Face vision tower) and timm (a name) is needed"
            )
        if not isinstance(layer, int):
            raise UserError(f"{WHERE}.layer: a whole number, got {layer!r}")
        self.layer, self.antialias = layer, antialias
        self.normalise = choice("normalise", normalise, ("token", "none"))
        self.source = str(path or timm)
        self.reader: Any
        if path is not None:
            self.reader = HubReader(path)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # random weights, where wanted, are the same on every rank
                self.reader = TimmReader(str(timm), weights, layer)
        super().__init__(self.reader.module)
        self.cell = self.reader.patch
        self.mean = _colour("mean", mean, self.reader.mean)
        self.std = _colour("std", std, self.reader.std)
        self.fixed, self.dim = self._try_out()
        self.moments_dim = self.dim

    def _try_out(self) -> tuple[bool, int]:
        """(whether it takes pictures of its own size only, channels), seen on a 2 x 3 grid of black patches."""
        try:
            seen = self._features(torch.zeros(1, 3, 2 * self.cell, 3 * self.cell))
            if seen.shape[2:] == (2, 3):
                return False, seen.shape[1]
        except UserError:
            raise
        except (ValueError, RuntimeError, AssertionError, TypeError, IndexError):
            pass  # every network refuses another size in its own way
        try:
            return True, self._features(torch.zeros(1, 3, *self.reader.own)).shape[1]
        except (ValueError, RuntimeError, AssertionError, TypeError, IndexError) as error:
            key = f"{WHERE}.{'path' if isinstance(self.reader, HubReader) else 'timm'}"
            raise UserError(f"{key} '{self.source}': gives no map of features ({one_line(error)})") from error

    @cached_property
    def identity(self) -> str:
        """Kind, geometry, normalisation and weights."""
        colours = ",".join(f"{v:.6g}" for v in [*self.mean.flatten().tolist(), *self.std.flatten().tolist()])
        return (
            f"features {type(self.teacher.module).__name__} patch={self.cell} layer={self.layer} fixed={self.fixed}"
            f" normalise={self.normalise} colours={colours} antialias={self.antialias}"
            f" weights={weights_id(self.teacher.module)}"
        )

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """See :meth:`Target.encode`."""
        grid = [side // self.cell for side in pictures.shape[-2:]]
        if self.fixed:
            pictures = F.interpolate(pictures, self.reader.own, mode="bilinear", align_corners=False)
        maps = self._features(pictures)
        if list(maps.shape[-2:]) != grid:
            maps = F.interpolate(maps, grid, mode="bilinear", align_corners=False)
        tokens = maps.flatten(2).transpose(1, 2)
        return F.layer_norm(tokens, (self.dim,)) if self.normalise == "token" else tokens

    @torch.no_grad()
    def _features(self, pictures: torch.Tensor) -> torch.Tensor:
        pixels = self._ready(pictures)
        return self.reader((pixels - self.mean.to(pixels)) / self.std.to(pixels), self.layer).float()


def _colour(key: str, given: Sequence[float] | None, known: Sequence[float] | None) -> torch.Tensor:
    """(3, 1, 1)."""
    chosen = known if given is None else given
    if chosen is None:
        raise UserError(f"{WHERE}.{key}: the network has no image processor that says it; give three numbers")
    if isinstance(chosen, str) or len(chosen) != 3 or (key == "std" and not min(chosen) > 0):
        raise UserError(f"{WHERE}.{key}: three numbers{' above 0' if key == 'std' else ''}, got {chosen!r}")
    return torch.tensor(list(chosen), dtype=torch.float32).view(3, 1, 1)
