"""An auto-encoder of a quarter of a million parameters for small pictures: one latent for 8 x 8 pixels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, which is what it starts as."""

    def __init__(self, width: int):
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Any, last.bias))
        self.layers = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, width, h, w) -> the same."""
        return x + self.layers(x)


class PatchAutoencoder(nn.Module):
    """Pictures in [-1, 1] <-> standardised latents, without a posterior.

    Pixels are folded 4 x 4 before the first convolution, so nothing is computed at full resolution.

    Args:
        channels: of a latent.
        width: channels inside, at a quarter of the resolution.

    Attributes:
        factor: side in pixels of what one latent covers.
        mean, std: buffers (channels,), of raw latents over pictures and places; measured after training.
    """

    factor = 8

    def __init__(self, channels: int = 16, width: int = 48):
        super().__init__()
        self.channels, self.width = channels, width
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, width, 3, padding=1),
            Residual(width),
            Residual(width),
            nn.PixelUnshuffle(2),
            nn.SiLU(),
            nn.Conv2d(4 * width, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 4 * width, 1),
            nn.PixelShuffle(2),
            Residual(width),
            Residual(width),
            Residual(width),
            nn.SiLU(),
            nn.Conv2d(width, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    @classmethod
    def of(cls, weights: dict[str, torch.Tensor]) -> PatchAutoencoder:
        """Build one from stored weights, whose shapes say its size; they are converted to float32.

        Raises:
            ValueError: the tensors are not those of such an auto-encoder.
        """
        try:
            width, channels = len(weights["encoder.1.weight"]), len(weights["encoder.6.weight"])
            made = cls(channels, width)
            made.load_state_dict({k: v.float() for k, v in weights.items()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(str(error).splitlines()[0]) from error
        return made

    def raw(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8 h, 8 w) in [-1, 1] -> latents (B, channels, h, w) as the last convolution gives them."""
        return self.encoder(pictures)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, 8 h, 8 w) in [-1, 1] -> latents (B, channels, h, w), mean 0 and deviation 1 in each channel."""
        mean, std = (self.get_buffer(name)[:, None, None] for name in ("mean", "std"))
        return (self.raw(pictures) - mean) / std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Standardised latents (B, channels, h, w) -> (B, 3, 8 h, 8 w), about [-1, 1]."""
        return self.decoder(latents)
