"""Latents of the auto-encoder that ships: for scenes, where no download is wanted."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from ....models.errors import UserError
from ....models.targets.base import fold as fold_maps
from ....models.targets.base import unfold, weights_id
from ....models.targets.frozen import WHERE, FrozenTarget, one_line, whole
from .patches import PatchAutoencoder

WEIGHTS = Path(__file__).parents[1] / "assets" / "scenes_autoencoder.safetensors"


class AutoencoderTarget(FrozenTarget):
    """Standardised latents of a small auto-encoder that was trained on scenes and knows no other pictures.

    A latent covers 8 x 8 pixels and has 16 channels, each of mean 0 and deviation 1 over scenes. On 192 held-out
    scenes it draws back 25.4 to 26.9 dB; objects keep their colours (the worst is off by .07, and no two colours are
    nearer than .27), words on signs cannot be read. What a linear probe reads of it: ``opsin data audit-target
    autoencoder``, table in :mod:`opsin.evaluation.target_audit`.

    Args:
        weights: file that ``opsin data autoencoder`` wrote; default: the one that ships.
        fold: side in latents of a token.
        antialias: of the resizing.

    Raises:
        UserError: no such file, or not of this auto-encoder.
    """

    pictures_at_once = 256

    def __init__(self, weights: str | None = None, fold: int = 1, antialias: bool = False):
        from safetensors.torch import load_file

        file = WEIGHTS if weights is None else Path(weights).expanduser()
        if not file.is_file():
            raise UserError(f"{WHERE}.weights: no file '{file}'")
        try:
            self.net = PatchAutoencoder.of(load_file(file))
        except Exception as error:  # safetensors has an error class of its own, in Rust
            raise UserError(
                f"{WHERE}.weights: '{file}' is not what 'opsin data autoencoder' writes ({one_line(error)})"
            ) from error
        super().__init__(self.net)
        self.fold, self.antialias = whole("fold", fold), antialias
        self.cell = self.net.factor * fold
        self.dim = self.moments_dim = self.net.channels * fold**2

    @cached_property
    def identity(self) -> str:
        """Kind, geometry and weights."""
        return f"autoencoder fold={self.fold} antialias={self.antialias} weights={weights_id(self.net)}"

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.encode`."""
        return fold_maps(self.net.encode(self._ready(pictures * 2 - 1)), self.fold)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.decode`."""
        latents = unfold(self._ready(tokens), grid, self.fold)
        return self.net.decode(latents) / 2 + 0.5
