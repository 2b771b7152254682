"""Small frozen networks and pictures for tests of targets."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from opsin.models.targets import Target

VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}  # fmt: skip


def pictures(count: int, rows: int, columns: int, cell: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, rows * cell, columns * cell, generator=torch.Generator().manual_seed(seed))


def encoded(target: Target, shown: torch.Tensor) -> torch.Tensor:
    """Of pictures whose size is that of their grid already."""
    return target.encode(shown, (shown.shape[2] // target.cell, shown.shape[3] // target.cell))


def dino(folder: Path, processor: bool = True, **more: int) -> str:
    """A folder with a tiny random DINOv2."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**{**VIT, "image_size": 32, "mlp_ratio": 2, **more})).save_pretrained(folder)
    if processor:
        CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return str(folder)
