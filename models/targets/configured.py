"""A target known by its configuration alone: enough to look at a run (``--check``, ``opsin plan``), not to train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..presets import configuration
from .base import Target

AUTOENCODER = "autoencoder_kl"


class ConfiguredTarget(Target):
    """Sizes of a target whose weights are elsewhere.

    Args:
        file: preset with the network's configuration.
        keywords: of the target that it stands in for.

    Attributes:
        module: the network on the meta device; of an auto-encoder what encodes and decodes, as it would lie in memory.
        resize: ``pixels``: the grid decides how large a picture it reads; ``features``: the view does.
    """

    def __init__(self, file: Path, keywords: Mapping[str, Any]):
        config = configuration(file)
        kind = config.pop("model_type")
        self.antialias = bool(keywords.get("antialias", False))
        self.resize = str(keywords.get("resize", "pixels"))
        self._said = f"{keywords.get('path')}, by its configuration alone (yamls/models/{file.name})"
        with torch.device("meta"):
            if kind == AUTOENCODER:
                self.module: nn.Module = _autoencoder(config)
                fold = int(keywords.get("fold", 2))
                self.cell = 2 ** (len(config["block_out_channels"]) - 1) * fold
                self.dim = config["latent_channels"] * fold**2
                self.moments_dim = self.dim * (1 if keywords.get("posterior") == "mean" else 2)
            else:
                from transformers import AutoConfig, AutoModel

                self.module = AutoModel.from_config(AutoConfig.for_model(kind, **config))
                self.cell, self.dim = int(config["patch_size"]), int(config["hidden_size"])
                self.moments_dim = self.dim

    @property
    def identity(self) -> str:
        """Name, and where its configuration is from."""
        return self._said

    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Refused: there are no weights."""
        raise UserError(f"target {self._said}: there are no weights to encode a picture with")


def _autoencoder(config: dict[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]  # seconds

    return AutoencoderKL(**config)
