"""Where a model family keeps its parts, so that methods never name a class.

Support for a new family is one file in ``models/families``: an :class:`Anatomy` (the model's side) and an
:class:`~opsin.models.geometry.ImageEncoder` (the data's side), joined by :func:`register_family`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from .errors import UserError, nearest
from .geometry import ImageEncoder

Pictures = list[torch.Tensor]
"""One (3, rows * patch, columns * patch) tensor in [0, 1] for each view, in order of appearance."""

PARTS = ("vision_tower", "mm_projector", "language_model", "auxiliary")
"""Parts of a model by which parameters are frozen, grouped and counted; named as LLaVA's flags name them."""

CAPABILITIES = {
    "masks": "attention masks of a method (who sees whom)",
    "packing": "several documents in one row",
    "branches": "independent questions that share one picture in one row",
    "bidirectional_images": "the choice whether visual tokens see all tokens of their own image",
}
"""What a family may refuse (``Anatomy.refuses``), and what each means."""

_FAMILY_MODULES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "idefics3", "internvl", "gemma3")
_FAMILIES: dict[str, tuple[Callable[[Any], Anatomy], type[ImageEncoder]]] = {}


@dataclass(frozen=True)
class Anatomy:
    """Module paths and the few functions by which families differ.

    Attributes:
        family: the Hugging Face ``model_type``.
        vision_tower: paths of the vision tower's modules.
        projector: paths of the modules and parameters between tower and language model.
        language_model: path of the decoder without its head (the seam for embeddings and masks).
        lm_head: path of the output projection.
        pictures: (micro-batch, processor) -> each view as the tower saw it.
        dummy: (hf, device, dtype) -> pixel arguments of the smallest legal image.
        body: path of the model without its head, which joins image features and text.
        layers: path of the decoder layers inside the language model.
        token_types: argument by which ``generate`` and ``forward`` of the whole model want to be told which tokens
            are visual (M-RoPE families from transformers 5 on, Gemma 3); None: they find out.
        bidirectional_images: by the family's own rule, visual tokens see all tokens of their image.
        refuses: what the family cannot do (keys of ``CAPABILITIES``) -> why, in words that end a sentence.
    """

    family: str
    vision_tower: tuple[str, ...]
    projector: tuple[str, ...]
    language_model: str
    lm_head: str
    pictures: Callable[[dict[str, torch.Tensor], Any], Pictures]
    dummy: Callable[[Any, torch.device, torch.dtype], dict[str, torch.Tensor]]
    body: str = "model"
    layers: str = "layers"
    token_types: str | None = None
    bidirectional_images: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)

    def require(self, capability: str, what: str) -> None:
        """Stop where ``what`` needs a capability (key of ``CAPABILITIES``) that the family does not have.

        Raises:
            UserError: the family refuses it.
        """
        assert capability in CAPABILITIES, capability
        if capability in self.refuses:
            raise UserError(f"{what}: not with a {self.family} model: {self.refuses[capability]}")

    def types(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Which tokens (B, L) are visual, as a keyword of the whole model's ``forward``; empty: not wanted."""
        return {self.token_types: (batch["image_ids"] >= 0).int()} if self.token_types else {}

    def decoder(self, hf: nn.Module) -> nn.Module:
        """The decoder without its head."""
        return hf.get_submodule(self.language_model)

    def decoder_layers(self, hf: nn.Module) -> nn.ModuleList:
        """The decoder's layers, first to last."""
        layers = self.decoder(hf).get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def head(self, hf: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, vocabulary) of hidden states (n, width), as the stock vision-language class makes them.

        None of the registered ones applies the soft cap or the scaling of its language model's configuration, which the
        language model alone would (transformers 4.57 and 5.23).
        """
        return hf.get_submodule(self.lm_head)(hidden)

    def part_of(self, name: str) -> str:
        """Part that the parameter ``name`` of the Hugging Face model belongs to; the longest path wins."""
        best, part = -1, "language_model"
        for candidate, paths in (("vision_tower", self.vision_tower), ("mm_projector", self.projector)):
            for path in paths:
                if (name == path or name.startswith(path + ".")) and len(path) > best:
                    best, part = len(path), candidate
        return part

    def image_features(self, hf: nn.Module, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Tower and projector on some pixels: (tokens, width), images one after the other."""
        out = hf.get_submodule(self.body).get_image_features(**pixels)  # type: ignore[operator]
        features = getattr(out, "pooler_output", out)
        if not isinstance(features, torch.Tensor):
            features = torch.cat(list(features), dim=0)
        return features.flatten(0, -2)


def register_family(
    *model_types: str, images: type[ImageEncoder]
) -> Callable[[Callable[[Any], Anatomy]], Any]:
    """Register an anatomy function and its image encoder for Hugging Face model types."""

    def register(make: Callable[[Any], Anatomy]) -> Callable[[Any], Anatomy]:
        for model_type in model_types:
            _FAMILIES[model_type] = (make, images)
        return make

    return register


def families() -> list[str]:
    """Registered Hugging Face model types."""
    for module in _FAMILY_MODULES:
        importlib.import_module(f".families.{module}", __package__)
    return sorted(_FAMILIES)


def _family(config: Any) -> tuple[Callable[[Any], Anatomy], type[ImageEncoder]]:
    known = families()
    if config.model_type not in known:
        raise UserError(f"no anatomy for model type '{config.model_type}'{nearest(config.model_type, known)}")
    return _FAMILIES[config.model_type]


def anatomy_of(hf: Any) -> Anatomy:
    """Anatomy of a Hugging Face vision-language model.

    Raises:
        UserError: the family is not registered; the line names the nearest one.
    """
    return _family(hf.config)[0](hf)


def image_encoder_for(processor: Any, config: Any) -> ImageEncoder:
    """Image encoder of a family, from its processor and configuration."""
    return _family(config)[1](processor, config)


def unnormalise(pixels: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """Undo the processor's mean and standard deviation: (..., 3, H, W) -> [0, 1]."""
    if not getattr(image_processor, "do_normalize", True):
        return pixels.clamp(0, 1)
    colours = (tuple(image_processor.image_mean), tuple(image_processor.image_std))
    mean, std = _on_device(colours, pixels.dtype, pixels.device)
    return (pixels * std + mean).clamp(0, 1)


@lru_cache(32)
def _on_device(
    colours: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Colours as (3, 1, 1) tensors, made once: each copy of a host's list makes the host wait for the device."""
    return tuple(torch.tensor(colour, dtype=dtype, device=device).view(3, 1, 1) for colour in colours)
