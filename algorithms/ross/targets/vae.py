"""Latents of a variational auto-encoder, 2 x 2 of them in a token: the target of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ....models.targets.base import Target, unfold, weights_id
from ....models.targets.base import fold as fold_maps
from ....models.targets.frozen import DTYPES, FrozenTarget, choice, whole
from .diffusers_models import autoencoder

_BLOCKS: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "flux": {
        **_BLOCKS,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "sd": {**_BLOCKS, "latent_channels": 4, "scaling_factor": 0.18215},
}
"""Name of ``config`` -> AutoencoderKL's arguments, as published with FLUX.1 and Stable Diffusion 1.5."""


class VAETarget(FrozenTarget):
    """Latents z = (z' - shift) * scale of diffusers' ``AutoencoderKL`` (ROSS: FLUX.1's, section 3 of the paper).

    Shift and scale are those of the auto-encoder's own configuration; one without a shift has 0. With the four
    resolutions of FLUX and Stable Diffusion a latent covers 8 pixels and a token of ``fold`` 2 16 pixels, and
    has 64 or 16 channels.

    Args:
        path: folder or hub name, as ``black-forest-labs/FLUX.1-dev``. Only safetensors are read.
        subfolder: of the auto-encoder in it, as ``vae``.
        posterior: ``sample``: mean and standard deviation are kept, and drawn from anew at every visit (the
            reference); ``mean``: the mean only, half the storage.
        fold: side in latents of a token.
        config: ``flux``, ``sd`` or AutoencoderKL's arguments, in place of ``path``: random weights, to measure
            speed and to test.
        dtype: ``float32``, or ``bfloat16``: faster, other latents.
        antialias: of the resizing (off in the reference).

    Raises:
        UserError: nothing to load there, or a value is out of range.
    """

    def __init__(
        self,
        path: str | None = None,
        subfolder: str | None = None,
        posterior: str = "sample",
        fold: int = 2,
        config: str | Mapping[str, Any] | None = None,
        dtype: str = "float32",
        antialias: bool = False,
    ):
        from diffusers import AutoencoderKL  # type: ignore[attr-defined]  # seconds

        self.posterior = choice("posterior", posterior, ("sample", "mean"))
        self.fold, self.antialias = whole("fold", fold), antialias
        if isinstance(config, str):
            config = GEOMETRIES[choice("config", config, GEOMETRIES)]
        chosen = DTYPES[choice("dtype", dtype, DTYPES)]
        example = "black-forest-labs/FLUX.1-dev with subfolder vae"
        vae = autoencoder(AutoencoderKL, path, subfolder, config, example)
        super().__init__(vae, chosen)
        self.vae: Any = vae
        made = vae.config
        self.factor = 2 ** (len(made.block_out_channels) - 1)
        self.cell = self.factor * self.fold
        self.dim = made.latent_channels * self.fold**2
        self.moments_dim = self.dim * (2 if posterior == "sample" else 1)
        # latents_mean and latents_std, one a channel: some later auto-encoders have them instead of a shift.
        self.shift = _by_channel(made.get("latents_mean"), made.shift_factor or 0.0)
        self.scale = made.scaling_factor / _by_channel(made.get("latents_std"), 1.0)

    def to(self, device: torch.device) -> Target:
        """See :meth:`Target.to`; shift and scale go along, or each step would wait for their copies."""
        self.shift, self.scale = self.shift.to(device), self.scale.to(device)
        return super().to(device)

    @cached_property
    def identity(self) -> str:
        """Kind, geometry and the encoder's weights (the decoder makes no target)."""
        used = nn.ModuleList([m for m in (self.vae.encoder, self.vae.quant_conv) if m is not None])
        config = self.vae.config
        return (
            f"vae AutoencoderKL channels={config.latent_channels} factor={self.factor} fold={self.fold}"
            f" posterior={self.posterior} shift={_shown(self.shift)} scale={_shown(self.scale)}"
            f" dtype={str(self.dtype).removeprefix('torch.')} antialias={self.antialias} weights={weights_id(used)}"
        )

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.encode`: means, and behind them standard deviations, both shifted and scaled."""
        found = self.vae.encode(self._ready(pictures * 2 - 1)).latent_dist
        scale = self.scale
        mean = fold_maps((found.mean.float() - self.shift) * scale, self.fold)
        if self.posterior == "mean":
            return mean
        return torch.cat([mean, fold_maps(found.std.float() * scale, self.fold)], dim=-1)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See :meth:`Target.decode`."""
        latents = unfold(tokens.to(self.device).float(), grid, self.fold) / self.scale + self.shift
        return self.vae.decode(self._ready(latents)).sample.float() / 2 + 0.5


def _by_channel(values: Any, otherwise: float) -> torch.Tensor:
    """(channels, 1, 1) of a configuration's list, else (1, 1, 1) of one number."""
    return torch.tensor([otherwise] if values is None else values, dtype=torch.float32).view(-1, 1, 1)


def _shown(values: torch.Tensor) -> str:
    return ",".join(f"{v:.6g}" for v in values.flatten().tolist())
