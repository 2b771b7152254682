"""Features of a frozen vision transformer or CNN: a target that cannot be turned back into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch.nn import functional as F

from ..errors import UserError
from .base import Target, weights_id
from .frozen import DTYPES, WHERE, FrozenTarget, choice, one_line, whole
from .readers import LAST, HubReader, Reader, TimmReader

RESIZES = ("pixels", "features")
_REFUSALS = (ValueError, RuntimeError, AssertionError, TypeError, IndexError)
"""Every network refuses a picture of another size in its own way."""


class ReaderTarget(FrozenTarget):
    """One feature a patch, as a :class:`~opsin.models.targets.readers.Reader` reads it off a network.

    Args:
        kind: with which the identity begins.
        reader: the network.
        layer, normalise, mean, std, antialias, resize, image_size, dtype: see :class:`FeatureTarget`.

    Attributes:
        fixed: whether the network takes pictures of its own size only.
    """

    def __init__(
        self,
        kind: str,
        reader: Reader,
        layer: int | str,
        normalise: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        antialias: bool,
        resize: str,
        image_size: int | None,
        dtype: str,
    ):
        self.kind, self.reader, self.layer, self.antialias = kind, reader, layer, antialias
        self.normalise = choice("normalise", normalise, ("token", "none"))
        self.resize = choice("resize", resize, RESIZES)
        super().__init__(reader.module, DTYPES[choice("dtype", dtype, DTYPES)])
        self.cell = reader.patch
        self.mean = _colour("mean", mean, reader.mean)
        self.std = _colour("std", std, reader.std)
        self.fixed, self.dim = self._try_out()
        self.moments_dim = self.dim
        self.image_size = None if image_size is None else self._checked_size(image_size)

    def _try_out(self) -> tuple[bool, int]:
        """(whether it takes pictures of its own size only, channels), seen on a 2 x 3 grid of black patches."""
        try:
            seen = self._features(torch.zeros(1, 3, 2 * self.cell, 3 * self.cell))
            if seen.shape[2:] == (2, 3):
                return False, seen.shape[1]
        except UserError:
            raise
        except _REFUSALS:
            pass
        try:
            return True, self._features(torch.zeros(1, 3, *self.reader.own)).shape[1]
        except _REFUSALS as error:
            raise UserError(f"{self.reader.source}: gives no map of features ({one_line(error)})") from error

    def _checked_size(self, side: int) -> int:
        if self.resize != "features":
            raise UserError(f"{WHERE}.image_size: goes with resize: features; with pixels the grid decides")
        if whole("image_size", side) < self.cell:
            raise UserError(f"{WHERE}.image_size: {side} pixels; one patch has {self.cell}")
        if self.fixed and (side, side) != tuple(self.reader.own):
            height, width = self.reader.own
            raise UserError(
                f"{WHERE}.image_size: {side}; this network takes pictures of {height}x{width} only"
            )
        return side

    @cached_property
    def identity(self) -> str:
        """Kind, geometry, normalisation and weights."""
        colours = ",".join(f"{v:.6g}" for v in [*self.mean.flatten().tolist(), *self.std.flatten().tolist()])
        more = (
            "" if self.resize == "pixels" else f" resize={self.resize}"
        )  # older targets say nothing of these
        more += "" if self.image_size is None else f" image_size={self.image_size}"
        more += "" if self.dtype == torch.float32 else f" dtype={str(self.dtype).removeprefix('torch.')}"
        return (
            f"{self.kind} {type(self.teacher.module).__name__} patch={self.cell} layer={self.layer} fixed={self.fixed}"
            f" normalise={self.normalise} colours={colours} antialias={self.antialias}{more}"
            f" weights={weights_id(self.teacher.module)}"
        )

    def to(self, device: torch.device) -> Target:
        """Move to a device, in place; colours, too, or every step would wait for their copy."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return super().to(device)

    def sized(self, pictures: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Views (B, 3, h, w) as the network reads them, float32 in [0, 1].

        With ``resize: features`` of their own size, or ``image_size`` squared; of one patch at least.
        """
        if self.resize == "pixels":
            return super().sized(pictures, rows, columns)
        height, width = (max(side, self.cell) for side in pictures.shape[-2:])
        if self.image_size is not None:
            height = width = self.image_size
        return self._resized(pictures, (height, width)).clamp(0, 1)

    def _resized(self, pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if pictures.shape[-2:] == size:
            return pictures.float()
        return F.interpolate(
            pictures.float(), size, mode="bilinear", align_corners=False, antialias=self.antialias
        )

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.encode`; pictures may have any size that :meth:`sized` gives."""
        if self.fixed:
            pictures = F.interpolate(pictures, self.reader.own, mode="bilinear", align_corners=False)
        maps = to_grid(self._features(pictures), grid)
        tokens = maps.flatten(2).transpose(1, 2)
        return F.layer_norm(tokens, (self.dim,)) if self.normalise == "token" else tokens

    @torch.no_grad()
    def _features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> map (B, C, h, w) float32 on the network's device."""
        pixels = (pictures.to(self.device, torch.float32) - self.mean) / self.std
        with torch.autocast(
            self.device.type, enabled=False
        ):  # in its own precision, whatever trains around it
            return self.reader(pixels.to(self.dtype), self.layer).float()


class FeatureTarget(ReaderTarget):
    """One feature a patch, of a network that was trained for something else (CLIP, SigLIP, DINOv2 ...).

    With ``resize: pixels`` pictures are resized to ``rows * patch`` by ``columns * patch`` and position embeddings
    are interpolated. With ``resize: features`` the picture goes in as it is, and the map that comes out is moved to
    the grid bilinearly (:func:`to_grid`). A network that takes pictures of its own size only gets them so either
    way (``fixed`` is True then). Class and register tokens are dropped.

    Args:
        path: folder or hub name of a Hugging Face vision transformer, or of a CLIP or SigLIP as a whole.
        timm: name of a timm network, in place of ``path``.
        weights: with ``timm``: ``timm`` (those that timm knows, from its hub), a file in timm's names, or None
            (random: to measure speed and to test).
        layer: with ``path`` an index into ``hidden_states``, with ``timm`` of a block or stage; negative counts
            from the end; always before a final norm, as LLaVA reads its tower. ``last``: the network's own output,
            ``last_hidden_state``, behind its final norm (CLIP's has none there, DINOv2's and SigLIP's has).
        normalise: ``token``: each feature to mean 0 and deviation 1 over its channels; ``none``.
        mean, std: of a colour, three each; default: what the network's own configuration says.
        antialias: of the resizing of pictures.
        resize: ``pixels`` or ``features``, see above.
        image_size: with ``resize: features``: side in pixels of the square that every picture is resized to.
        dtype: ``float32``, or ``bfloat16``: faster, other features. What is given is float32.

    Raises:
        UserError: no such network or layer, or its mean and deviation of colours are not known.
    """

    def __init__(
        self,
        path: str | None = None,
        timm: str | None = None,
        weights: str | None = "timm",
        layer: int | str = -1,
        normalise: str = "token",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        antialias: bool = False,
        resize: str = "pixels",
        image_size: int | None = None,
        dtype: str = "float32",
    ):
        if (path is None) == (timm is None):
            raise UserError(
                f"{WHERE}.path: one of path (a Hugging Face vision tower) and timm (a name) is needed"
            )
        check_layer(layer)
        reader: Reader
        if path is not None:
            reader = HubReader(str(path))
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # random weights, where wanted, are the same on every rank
                reader = TimmReader(str(timm), weights, layer)
        super().__init__(
            "features", reader, layer, normalise, mean, std, antialias, resize, image_size, dtype
        )


def to_grid(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Maps (B, C, h, w) on another grid, (B, C, rows, columns): bilinear, corners not aligned, no antialiasing."""
    if tuple(maps.shape[-2:]) == tuple(grid):
        return maps
    return F.interpolate(maps, tuple(grid), mode="bilinear", align_corners=False)


def check_layer(layer: int | str) -> None:
    """Refuse what is neither a whole number nor ``last``.

    Raises:
        UserError: it is something else.
    """
    if layer != LAST and (not isinstance(layer, int) or isinstance(layer, bool)):
        raise UserError(f"{WHERE}.layer: a whole number, or {LAST}; got {layer!r}")


def _colour(key: str, given: Sequence[float] | None, known: Sequence[float] | None) -> torch.Tensor:
    """(3, 1, 1)."""
    chosen = known if given is None else given
    if chosen is None:
        raise UserError(f"{WHERE}.{key}: the network has no image processor that says it; give three numbers")
    if isinstance(chosen, str) or len(chosen) != 3 or (key == "std" and not min(chosen) > 0):
        raise UserError(f"{WHERE}.{key}: three numbers{' above 0' if key == 'std' else ''}, got {chosen!r}")
    return torch.tensor(list(chosen), dtype=torch.float32).view(3, 1, 1)
