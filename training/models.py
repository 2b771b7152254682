"""Constructors behind ``model.name``."""

from __future__ import annotations

import contextlib
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..models.errors import UserError
from ..models.export import load_model
from ..models.vlm import VisionLanguageModel


def hf_vlm(
    pretrained_model_name_or_path: str,
    attn_implementation: str | None = None,
    dtype: str = "float32",
    bidirectional_images: bool | None = None,
    meta: bool = False,
) -> VisionLanguageModel:
    """Any registered Hugging Face VLM, from a folder or hub name.

    Args:
        pretrained_model_name_or_path: folder or hub name.
        attn_implementation: ``sdpa``, ``eager``, ``flex_attention``, ``flash_attention_2``.
        dtype: of the weights in memory; training in bf16 autocast wants ``float32`` here.
        bidirectional_images: let visual tokens see all tokens of their image; None: as the folder says.
        meta: build on the meta device, without weights (set by ``--check``).
    """
    with torch.device("meta") if meta else contextlib.nullcontext():
        return load_model(
            pretrained_model_name_or_path,
            bidirectional_images=bidirectional_images,
            attn_implementation=attn_implementation,
            dtype=dtype,
            weights=not meta,
        )


def scenes_llava(
    language_model: str | None = "shipped",
    vision_tower: str | None = "shipped",
    image_size: int = 64,
    patch_size: int = 8,
    vision_width: int = 96,
    vision_layers: int = 3,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    bidirectional_images: bool = False,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> VisionLanguageModel:
    """A LLaVA of about a million parameters that speaks the language of ``opsin data scenes``.

    Args:
        language_model: safetensors file with the language model's weights; ``shipped``: the file in this
            package, trained on text alone (``opsin data language-model``); None: random.
        vision_tower: the same for the tower; ``shipped``: what a captioner left behind
            (``opsin data vision-tower``); None: random.
        image_size, patch_size, vision_width, vision_layers, hidden_size, layers, heads, seed: see
            ``models.tiny.tiny_llava``.
        bidirectional_images, attn_implementation: see :func:`hf_vlm`.
    """
    from ..data.scenes import SceneConfig, vocabulary
    from ..models.tiny import tiny_llava

    hf, processor = tiny_llava(
        vocabulary(SceneConfig()),
        image_size=image_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=vision_layers,
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        seed=seed,
    )
    hf.set_attn_implementation(attn_implementation)
    for part, source in (("language_model", language_model), ("vision_tower", vision_tower)):
        if source is not None:
            load_part(hf.get_submodule(f"model.{part}"), part, source)
    return VisionLanguageModel(hf, processor, bidirectional_images=bidirectional_images)


TOWER_4 = "vision_model."
"""What transformers 4 puts before the names of a CLIP tower's tensors, and newer ones do not."""


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
    if source == "shipped":
        path = Path(str(resources.files("opsin.models"))) / "assets" / f"scenes_{part}.safetensors"
    else:
        path = Path(source)
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


def smollm2_llava_model(
    image_size: int = 128,
    rgb: bool = True,
    bidirectional_images: bool = False,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> VisionLanguageModel:
    """SmolLM2-135M with an EfficientNet-Lite0 tower and a fresh projector, from the packages of ``opsin[real]``.

    Args:
        image_size: pixels; 128 gives 16 visual tokens.
        rgb: give each visual token the mean colour of its cell as well.
        bidirectional_images, attn_implementation: see :func:`hf_vlm`.
        seed: of the projector.
    """
    from ..models.smollm2_llava import smollm2_llava

    hf, processor = smollm2_llava(image_size=image_size, rgb=rgb, seed=seed)
    hf.set_attn_implementation(attn_implementation)
    return VisionLanguageModel(hf, processor, bidirectional_images=bidirectional_images)
