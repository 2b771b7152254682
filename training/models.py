"""Constructors behind ``model.name``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from ..models.errors import UserError
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


def llava_from_parts(
    language_model: str,
    vision_tower: str | dict[str, Any] | None = None,
    vision_towers: list[Any] | None = None,
    mm_projector: str | dict[str, Any] = "mlp2x_gelu",
    mm_vision_select_layer: int | None = None,
    image_token: str = "<image>",
    image_aspect_ratio: str = "square",
    bidirectional_images: bool = False,
    attn_implementation: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    meta: bool = False,
) -> VisionLanguageModel:
    """An ordinary LLaVA from a vision tower, a language model and a new projector: where stage 1 begins.

    Args:
        language_model: folder or hub name of a causal language model, with its tokenizer.
        vision_tower: folder or hub name (CLIP, SigLIP, DINOv2 ..., whole or vision half; timm's), ``timm:NAME``, or
            ``{name: ..., layer: -2, image_mean: ..., image_std: ..., weights: FILE}``.
        vision_towers: instead of it, two or more such: all see the picture, and the projector reads their features
            side by side on the first one's grid.
        mm_projector: ``mlp2x_gelu`` (or another activation), or ``{type: mlp2x_gelu, weights: FILE}``.
        mm_vision_select_layer: hidden state of the tower that is read; None: the last but one.
        image_token: added to the vocabulary where it is not in it.
        image_aspect_ratio: ``square`` (stretched) or ``pad`` (padded to a square with the mean colour first).
        bidirectional_images, attn_implementation, dtype: see :func:`hf_vlm`.
        seed: of the projector.
        meta: build on the meta device, without weights (set by ``--check``).
    """
    from ..models.from_parts import from_parts

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise UserError(f"model dtype '{dtype}': no dtype of torch; use float32 or bfloat16")
    if (vision_tower is None) == (vision_towers is None):
        raise UserError("model: needs either vision_tower or vision_towers")
    with torch.device("meta") if meta else contextlib.nullcontext():
        hf, processor = from_parts(
            vision_tower if vision_towers is None else list(vision_towers),  # type: ignore[arg-type]
            language_model,
            mm_projector,
            layer=mm_vision_select_layer,
            image_token=image_token,
            image_aspect_ratio=image_aspect_ratio,
            dtype=kind,
            seed=seed,
            weights=not meta,
        )
    if attn_implementation is not None:
        hf.set_attn_implementation(attn_implementation)
    return VisionLanguageModel(hf, processor, bidirectional_images=bidirectional_images)


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
    stages: list[Any] | None = None,
) -> VisionLanguageModel:
    """SmolLM2-135M with an EfficientNet-Lite0 tower and a fresh projector, from the packages of ``opsin[real]``.

    Args:
        image_size: pixels; 128 gives 16 visual tokens.
        rgb: give each visual token the mean colour of its cell as well.
        stages: maps of the tower that make a token: ``[head, 3]`` (default), or ``[3]``, the finer one alone, which gives four
            times as many visual tokens (64 at 128 pixels).
        bidirectional_images, attn_implementation: see :func:`hf_vlm`.
        seed: of the projector.
    """
    from ..models.smollm2_llava import STAGES, smollm2_llava

    chosen = STAGES if stages is None else stages
    hf, processor = smollm2_llava(image_size=image_size, rgb=rgb, seed=seed, stages=chosen)
    hf.set_attn_implementation(attn_implementation)
    return VisionLanguageModel(hf, processor, bidirectional_images=bidirectional_images)
