"""Weights that ship with Opsin: the parts of ``scenes_llava``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import UserError

SCENES_TOWER = {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3}
"""Sizes of the vision tower that ships."""

TOWER_4 = "vision_model."
"""What transformers 4 puts before the names of a CLIP tower's tensors, and newer ones do not."""


def shipped_file(part: str) -> Path:
    """Where the weights of ``language_model`` or ``vision_tower`` lie."""
    return Path(str(resources.files("opsin.models"))) / "assets" / f"scenes_{part}.safetensors"


def load_part(module: Any, part: str, source: str) -> None:
    """Put saved weights into one part of ``scenes_llava``; every tensor must be there and fit.

    Args:
        module: the part.
        part: ``language_model`` or ``vision_tower``.
        source: safetensors file, or ``shipped``.

    Raises:
        UserError: no such file, or other tensors.
    """
    command = f"opsin data {part.replace('_', '-')} --out FILE"
    path = shipped_file(part) if source == "shipped" else Path(source)
    if not path.is_file():
        raise UserError(f"model.{part}: no file '{path}'; make it with `{command}`")
    here = {k.removeprefix(TOWER_4): k for k in module.state_dict()}
    stored = {here.get(k.removeprefix(TOWER_4), k): v.float() for k, v in load_file(path).items()}
    wanted = {k: v.shape for k, v in module.state_dict().items() if v.is_floating_point()}
    if wanted != {k: v.shape for k, v in stored.items()}:
        raise UserError(
            f"model.{part}: '{path}' holds other tensors than this model; sizes must be those it was trained "
            f"with ({command} trains anew), or set {part}: null"
        )
    module.load_state_dict(stored, strict=False)  # buffers of position numbers are not stored


def scenes_tower() -> Any:
    """The vision tower that ships, a ``CLIPVisionModel`` in ``eval`` mode, float32.

    It was trained as a captioner's on scenes (``opsin data vision-tower``) and knows no other pictures. It reads
    pictures normalised by ``models.tiny.IMAGE_MEAN`` and ``IMAGE_STD``.
    """
    from transformers import CLIPVisionModel

    from .tiny import tiny_vision_config

    with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced
        tower = CLIPVisionModel(tiny_vision_config(**SCENES_TOWER))
    load_part(tower, "vision_tower", "shipped")
    return tower.eval()
