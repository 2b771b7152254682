"""Vision networks of Hugging Face and of timm as one thing: pictures in, a map of features out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....models.errors import UserError
from .frozen import WHERE, one_line

_MOST_PREFIX = 32
"""Class and register tokens that a transformer may put before its patches; more is another grid."""


class HubReader:
    """A vision transformer of Hugging Face, alone or the image half of a CLIP or SigLIP.

    Attributes:
        module: the network.
        patch: pixels a feature.
        own: height and width in pixels of the pictures that it was trained on.
        mean, std: of its image processor, or None where the folder has none.
    """

    def __init__(self, path: str):
        from transformers import AutoConfig, AutoModel

        if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise UserError(f"{WHERE}.path '{path}': no such folder")
        try:
            whole = AutoConfig.from_pretrained(path)
            loaded, report = AutoModel.from_pretrained(path, output_loading_info=True)
        except Exception as error:  # hub, cache, names, shapes: a dozen kinds
            raise UserError(f"{WHERE}.path '{path}': cannot be loaded ({one_line(error)})") from error
        config: Any = getattr(whole, "vision_config", None) or whole
        half = loaded if config is whole else getattr(loaded, "vision_model", None)
        if half is None or not isinstance(getattr(config, "patch_size", None), int):
            raise UserError(f"{WHERE}.path '{path}': a {type(loaded).__name__} is no vision transformer")
        lost = sorted(k for k in report["missing_keys"] if "pool" not in k and "text_model" not in k)
        if lost:  # transformers warns, and leaves them random
            raise UserError(
                f"{WHERE}.path '{path}': the weights have no '{lost[0]}' ({len(lost)} are missing)"
            )
        self.module: nn.Module = half
        self.patch: int = config.patch_size
        side = getattr(config, "image_size", 224)
        self.own = (side, side) if isinstance(side, int) else (side[0], side[1])
        self.mean, self.std = _of_processor(path)
        asked = "interpolate_pos_encoding" in inspect.signature(half.forward).parameters
        self._more: dict[str, Any] = {"interpolate_pos_encoding": True} if asked else {}

    def __call__(self, pixels: torch.Tensor, layer: int) -> torch.Tensor:
        """Normalised pictures (B, 3, H, W) -> ``hidden_states[layer]`` as (B, C, H / patch, W / patch).

        Raises:
            ValueError: the network has no such grid.
        """
        hidden = self.module(pixel_values=pixels, output_hidden_states=True, **self._more).hidden_states
        if not -len(hidden) <= layer < len(hidden):
            raise UserError(f"{WHERE}.layer: {layer}; there are 0 to {len(hidden) - 1}, or -1 for the last")
        rows, columns = (side // self.patch for side in pixels.shape[-2:])
        tokens = hidden[layer]
        prefix = tokens.shape[1] - rows * columns
        if tokens.ndim != 3 or not 0 <= prefix <= _MOST_PREFIX:
            raise ValueError(f"{tuple(tokens.shape)} features for {rows} x {columns} patches")
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))


class TimmReader:
    """A network of timm; attributes as of :class:`HubReader`."""

    def __init__(self, architecture: str, weights: str | None, layer: int):
        from timm.data.config import resolve_model_data_config

        from ....models.timm_maps import build

        try:
            self.module: Any = build(architecture, None, weights, dynamic_img_size=True)
        except UserError as refused:
            if not isinstance(refused.__cause__, TypeError):
                raise UserError(f"{WHERE}.timm: {refused}") from refused
            self.module = build(architecture, None, weights)  # a network without that keyword
        known = self.module.feature_info
        if not -len(known) <= layer < len(known):
            raise UserError(f"{WHERE}.layer: {layer}; there are 0 to {len(known) - 1}, or -1 for the last")
        self.patch: int = known[layer]["reduction"]
        data = resolve_model_data_config(self.module)
        self.own: tuple[int, int] = data["input_size"][1:]
        self.mean: Sequence[float] | None = data["mean"]
        self.std: Sequence[float] | None = data["std"]

    def __call__(self, pixels: torch.Tensor, layer: int) -> torch.Tensor:
        """Normalised pictures (B, 3, H, W) -> map of block or stage ``layer`` (B, C, h, w), before a final norm."""
        from ....models.timm_maps import feature_maps

        return feature_maps(self.module, pixels, [layer])[0]


def _of_processor(path: str) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(path, use_fast=False)
    except Exception:  # a folder without preprocessor_config.json: mean and std are asked for by name
        return None, None
    return getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
