"""Raw pixels of each patch (ROSS-R, pixel variant)."""

from __future__ import annotations

import torch

from ....models.targets.base import Target, fold, unfold
from ....models.targets.frozen import whole


class PixelTarget(Target):
    """RGB values in [-1, 1] of a patch: C = 3 * cell * cell.

    Args:
        cell: side of a patch in pixels after resizing.
        antialias: of that resizing.
    """

    def __init__(self, cell: int = 16, antialias: bool = False):
        self.cell, self.antialias = whole("cell", cell), antialias
        self.dim = self.moments_dim = 3 * cell * cell

    @property
    def identity(self) -> str:
        """Kind and geometry."""
        return f"pixels cell={self.cell} antialias={self.antialias}"

    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.encode`."""
        return fold(pictures * 2 - 1, self.cell)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.decode`."""
        return unfold(tokens, grid, self.cell) / 2 + 0.5
