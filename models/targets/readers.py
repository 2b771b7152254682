"""Vision networks of Hugging Face and of timm as one thing: pictures in, a map of features out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .. import towers  # our own tower class, if a configuration names it
from ..errors import UserError
from .frozen import WHERE, one_line

LAST = "last"
"""A ``layer``: the network's own final output, behind its final norm where it has one."""

_MOST_PREFIX = 32
"""Class and register tokens that a transformer may put before its patches; more is another grid."""


class Reader(Protocol):
    """What a target of features asks of a network.

    Attributes:
        module: the network.
        source: where it is from, for messages.
        patch: pixels a feature.
        own: height and width in pixels of the pictures that it was trained on.
        mean, std: of a colour, as it was trained; None where nothing says so.
    """

    module: nn.Module
    source: str
    patch: int
    own: tuple[int, int]
    mean: Sequence[float] | None
    std: Sequence[float] | None

    def __call__(self, pixels: torch.Tensor, layer: int | str) -> torch.Tensor:
        """Normalised pictures (B, 3, H, W) -> map (B, C, h, w) of a layer, without class or register tokens.

        A last row or column of pixels that fills no patch is left out, as a strided convolution does.

        Raises:
            ValueError: the network has no map for pictures of this size.
            UserError: no such layer.
        """
        ...


class TransformerReader:
    """A vision transformer of Hugging Face that takes ``pixel_values``; see :class:`Reader`.

    Args:
        module: it.
        config: its configuration, with ``patch_size`` and, mostly, ``image_size``.
        source: where it is from, for messages.
        mean, std: of a colour.
    """

    def __init__(
        self,
        module: nn.Module,
        config: Any,
        source: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ):
        self.module, self.source, self.mean, self.std = module, source, mean, std
        self.patch: int = config.patch_size
        side = getattr(config, "image_size", 224)
        self.own: tuple[int, int] = (side, side) if isinstance(side, int) else (side[0], side[1])
        asked = "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
        self._more: dict[str, Any] = {"interpolate_pos_encoding": True} if asked else {}
        self._any_size = not isinstance(module, towers.TokenTower)

    def __call__(self, pixels: torch.Tensor, layer: int | str) -> torch.Tensor:
        """``last_hidden_state`` or ``hidden_states[layer]``; see :meth:`Reader.__call__`."""
        if not self._any_size and tuple(pixels.shape[-2:]) != self.own:
            raise ValueError(f"pictures of {self.own} pixels are needed")
        if layer == LAST:
            tokens = self.module(pixel_values=pixels, **self._more).last_hidden_state
        else:
            hidden = self.module(pixel_values=pixels, output_hidden_states=True, **self._more).hidden_states
            if not -len(hidden) <= int(layer) < len(hidden):
                raise UserError(
                    f"{WHERE}.layer: {layer}; there are 0 to {len(hidden) - 1}, or -1 for the last"
                )
            tokens = hidden[int(layer)]
        rows, columns = (side // self.patch for side in pixels.shape[-2:])
        prefix = tokens.shape[1] - rows * columns
        if tokens.ndim != 3 or not 0 <= prefix <= _MOST_PREFIX:
            raise ValueError(f"{tuple(tokens.shape)} features for {rows} x {columns} patches")
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, (rows, columns))


class HubReader(TransformerReader):
    """A vision transformer in a folder or on the hub, alone or the image half of a CLIP or SigLIP.

    Raises:
        UserError: nothing can be loaded from there, or it is no vision transformer.
    """

    def __init__(self, path: str):
        from transformers import AutoConfig, AutoModel

        source = f"{WHERE}.path '{path}'"
        if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
            raise UserError(f"{source}: no such folder")
        try:
            whole = AutoConfig.from_pretrained(path)
            loaded, report = AutoModel.from_pretrained(path, output_loading_info=True)
        except Exception as error:  # hub, cache, names, shapes: a dozen kinds
            raise UserError(f"{source}: cannot be loaded ({one_line(error)})") from error
        config: Any = getattr(whole, "vision_config", None) or whole
        half = loaded if config is whole else getattr(loaded, "vision_model", None)
        if half is None or not isinstance(getattr(config, "patch_size", None), int):
            raise UserError(f"{source}: a {type(loaded).__name__} is no vision transformer")
        lost = sorted(k for k in report["missing_keys"] if "pool" not in k and "text_model" not in k)
        if lost:  # transformers warns, and leaves them random
            raise UserError(f"{source}: the weights have no '{lost[0]}' ({len(lost)} are missing)")
        super().__init__(half, config, source, *colours(path))


class TimmReader:
    """A network of timm; see :class:`Reader`.

    Args:
        architecture: timm's name.
        weights: as of :func:`opsin.models.timm_maps.build`.
        layer: that will be read: it decides how many pixels a feature covers.

    Raises:
        UserError: no such network, weights or layer.
    """

    def __init__(self, architecture: str, weights: str | None, layer: int | str):
        from timm.data.config import resolve_model_data_config

        from ..timm_maps import build

        self.source = f"{WHERE}.timm '{architecture}'"
        try:
            self.module: Any = build(architecture, None, weights, dynamic_img_size=True)
        except UserError as refused:
            if not isinstance(refused.__cause__, TypeError):
                raise UserError(f"{WHERE}.timm: {refused}") from refused
            self.module = build(architecture, None, weights)  # a network without that keyword
        known = self.module.feature_info
        index = -1 if layer == LAST else int(layer)
        if not -len(known) <= index < len(known):
            raise UserError(f"{WHERE}.layer: {layer}; there are 0 to {len(known) - 1}, or -1 for the last")
        self.patch: int = known[index]["reduction"]
        data = resolve_model_data_config(self.module)
        self.own: tuple[int, int] = data["input_size"][1:]
        self.mean: Sequence[float] | None = data["mean"]
        self.std: Sequence[float] | None = data["std"]

    def __call__(self, pixels: torch.Tensor, layer: int | str) -> torch.Tensor:
        """Map behind the final norm, or of block or stage ``layer`` before it; see :meth:`Reader.__call__`."""
        from ..timm_maps import HEAD, feature_maps

        if hasattr(self.module, "patch_embed"):  # it refuses what fills no patch; a CNN pads it
            rows, columns = (side - side % self.patch for side in pixels.shape[-2:])
            pixels = pixels[..., :rows, :columns]
        return feature_maps(self.module, pixels, [HEAD if layer == LAST else layer])[0]


def colours(path: str | Path) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and deviation of the image processor in a folder or on the hub; None twice where there is none."""
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(path, use_fast=False)
    except Exception:  # a folder without preprocessor_config.json: mean and std are asked for by name
        return None, None
    return getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
