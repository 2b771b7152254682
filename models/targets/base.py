"""What a method predicts: a vector for each patch, made of the picture by a frozen function.

A target gives one vector for each visual token, whatever the model's grid is. Most resize each view to ``cell``
pixels a patch, and auto-encoders fold ``fold x fold`` latents into one token.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UserError


def fold(maps: torch.Tensor, by: int) -> torch.Tensor:
    """Maps (B, C, rows * by, columns * by) -> tokens (B, rows * columns, C * by * by), raster order.

    Channel ``c * by * by + i * by + j`` of a token is channel c at row i, column j of its window.
    """
    return F.pixel_unshuffle(maps, by).flatten(2).transpose(1, 2)


def unfold(tokens: torch.Tensor, grid: tuple[int, int], by: int) -> torch.Tensor:
    """Undo :func:`fold`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), by)


def weights_id(module: nn.Module) -> str:
    """Hash of a module's tensors by value (12 hex digits): which weights made a target."""
    digest = hashlib.blake2b(digest_size=6)
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Target(ABC):
    """A frozen function from pictures to one vector a patch. Not a module: no checkpoint ever meets it.

    Attributes:
        dim: C, channels of a target token.
        moments_dim: channels as :meth:`moments` gives and a dataset stores them: C, or 2 C where a posterior
            is sampled anew each time (mean, then standard deviation).
        cell: side in pixels of what one token covers, in the resized picture.
        antialias: of the resizing (off in the reference).
    """

    dim: int
    moments_dim: int
    cell: int
    antialias: bool = False
    pictures_at_once: int = 32

    @property
    @abstractmethod
    def identity(self) -> str:
        """What made the target: kind, geometry and weights. Equal exactly when the latents are."""

    @abstractmethod
    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Moments of pictures that :meth:`sized` has made: (B, rows * columns, M) float32, raster order.

        Args:
            pictures: (B, 3, H, W) float32 in [0, 1]; H x W is rows * cell x columns * cell, except for a target
                whose :meth:`sized` says otherwise.
            grid: (rows, columns) of the model's patches.
        """

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, rows * columns, C) -> pictures (B, 3, rows * cell, columns * cell), with a graph.

        Colours are 0 .. 1 where the tokens are those of a picture; what lies outside is not cut off, because a
        clamp has no gradient there.

        Raises:
            UserError: this target cannot be turned back into a picture.
        """
        raise UserError(f"{type(self).__name__}: this target cannot be turned back into a picture")

    def to(self, device: torch.device) -> Target:
        """Move to a device, in place."""
        return self

    @torch.no_grad()
    def moments(self, pictures: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Targets of several views, one after the other: (P, M) float32, P the sum of rows * columns.

        Args:
            pictures: (3, h, w) in [0, 1] each, any size: exactly what the tower saw of the view.
            grids: (rows, columns) of each.
        """
        if not pictures:
            return torch.zeros(0, self.moments_dim)
        found: dict[int, torch.Tensor] = {}
        for grid, members in alike(pictures, grids):  # one call a size, not one a picture
            for start in range(0, len(members), self.pictures_at_once):
                chunk = members[start : start + self.pictures_at_once]
                encoded = self.encode(self.sized(torch.stack([pictures[i] for i in chunk]), *grid), grid)
                found.update(zip(chunk, encoded.unbind(), strict=True))
        return torch.cat([found[i] for i in range(len(pictures))])

    def draw(self, moments: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Targets (P, C) of moments (P, M); ``noise`` (P, C) standard normal where M is 2 C."""
        if self.moments_dim == self.dim:
            return moments
        assert noise is not None
        mean, deviation = moments.split(self.dim, dim=-1)
        return mean + deviation * noise

    @property
    def draws(self) -> bool:
        """Whether :meth:`draw` needs noise."""
        return self.moments_dim != self.dim

    def sized(self, pictures: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Views (B, 3, h, w) as this target reads them: (B, 3, rows * cell, columns * cell) float32 in [0, 1].

        A target that moves a map to the grid afterwards may give another size.
        """
        size = (rows * self.cell, columns * self.cell)
        if pictures.shape[-2:] == size:
            return pictures.float()
        resized = F.interpolate(
            pictures.float(), size, mode="bilinear", align_corners=False, antialias=self.antialias
        )
        return resized.clamp(0, 1)


def alike(
    pictures: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]]
) -> list[tuple[tuple[int, int], list[int]]]:
    """Views that can be handled together: (grid, ordinals) for each size of picture and grid."""
    groups: dict[tuple, list[int]] = {}
    for i, (picture, grid) in enumerate(zip(pictures, grids, strict=True)):
        groups.setdefault((*picture.shape, *grid), []).append(i)
    return [((key[-2], key[-1]), members) for key, members in groups.items()]
