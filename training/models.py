"""Constructors behind ``model.name``."""

from __future__ import annotations

import contextlib

import torch

from ..models.export import load_model
from ..models.shipped import load_part
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
