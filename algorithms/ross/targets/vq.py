"""Codebook vectors of a vector-quantised auto-encoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ....models.errors import UserError
from ....models.targets.base import fold as fold_maps
from ....models.targets.base import unfold, weights_id
from ....models.targets.frozen import WHERE, FrozenTarget, whole
from .diffusers_models import autoencoder

CELL = 16
"""Pixels of a token where ``fold`` is not given: as with FLUX's latents."""


class VQTarget(FrozenTarget):
    """The codebook vector of each index of diffusers' ``VQModel``: a continuous target, no classification.

    So the authors describe their VQGAN variant (issue 24 of their repository): only the target changes.

    Args:
        path: folder or hub name. Only safetensors are read.
        subfolder: of the auto-encoder in it, as ``vqvae``.
        fold: side in latents of a token; default: what makes a token cover 16 pixels.
        scale: factor on the vectors. Denoising starts from noise of deviation 1: a codebook of other size
            wants 1 / its own deviation.
        config: VQModel's arguments, in place of ``path``: random weights.
        antialias: of the resizing.

    Raises:
        UserError: nothing to load there, or a value is out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        subfolder: str | None = None,
        fold: int | None = None,
        scale: float = 1.0,
        config: Mapping[str, Any] | None = None,
        antialias: bool = False,
    ):
        from diffusers import VQModel  # type: ignore[attr-defined]  # seconds

        if not isinstance(scale, int | float) or not scale > 0:
            raise UserError(f"{WHERE}.scale: a number above 0, got {scale!r}")
        vq = autoencoder(
            VQModel,
            path,
            subfolder,
            config,
            "CompVis/ldm-super-resolution-4x-openimages with subfolder vqvae",
        )
        super().__init__(vq)
        self.vq: Any = vq
        self.factor = 2 ** (len(vq.config.block_out_channels) - 1)
        self.fold = max(1, CELL // self.factor) if fold is None else whole("fold", fold)
        self.scale, self.antialias = float(scale), antialias
        self.cell = self.factor * self.fold
        self.dim = self.moments_dim = self.codebook.shape[1] * self.fold**2

    @property
    def codebook(self) -> torch.Tensor:
        """(codes, channels), without ``scale``."""
        return self.vq.quantize.embedding.weight

    @cached_property
    def identity(self) -> str:
        """Kind, geometry, weights of encoder and codebook."""
        used = nn.ModuleList([self.vq.encoder, self.vq.quant_conv, self.vq.quantize])
        return (
            f"vq VQModel codes={len(self.codebook)} factor={self.factor} fold={self.fold} scale={self.scale:.6g}"
            f" antialias={self.antialias} weights={weights_id(used)}"
        )

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.encode`."""
        codes = self.vq.quantize(self.vq.encode(self._ready(pictures * 2 - 1)).latents)[2][2]
        rows, columns = (side // self.factor for side in pictures.shape[-2:])
        # By index, not what the quantiser returns: that went through `z + (code - z)`, which rounds.
        vectors = self.codebook[codes.reshape(len(pictures), rows, columns)].permute(0, 3, 1, 2)
        return fold_maps(vectors * self.scale, self.fold)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.decode`. Vectors are taken as they are, not moved to the nearest code."""
        vectors = unfold(self._ready(tokens), grid, self.fold) / self.scale
        # The parts, not VQModel.decode: with `lookup_from_codebook` it would take vectors for indices.
        spatial = vectors if self.vq.config.norm_type == "spatial" else None
        pictures = self.vq.decoder(self.vq.post_quant_conv(vectors), spatial)
        return pictures / 2 + 0.5
