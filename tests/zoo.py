"""Tiny random models of real architectures, with matching processors; built from config classes, no download."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from opsin.data.schema import pack_images

FAMILIES = ("llava", "llava_next", "qwen2_5_vl")
"""One of each kind of geometry: what most tests run with."""

EVERY_FAMILY = (*FAMILIES, "llava_onevision", "idefics3", "smolvlm", "internvl", "qwen2_vl", "gemma3")
"""All that are registered: what the contract of families is tested with."""

SPECIALS = [
    "<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<video>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<img>", "</img>", "<IMG_CONTEXT>", "<start_of_image>", "<end_of_image>", "<image_soft_token>",
]  # fmt: skip

CORPUS = [
    "What colour is the large cube to the left of the small red cone? Answer briefly.",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
    "system user assistant Describe the picture in one sentence. There are 12 objects: a small blue sphere.",
    "Is there a green cylinder? yes no red green blue yellow small large left right one two three",
]


@lru_cache(1)
def _raw() -> Tokenizer:
    """Byte-level BPE of about 450 entries, with every special token of all families."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    raw.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return raw


def named_tokenizer(**tokens: str) -> Any:
    """The tokenizer with named tokens (``image_token`` ...), as those of some families have."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(_raw()), pad_token="<pad>", eos_token="</s>", bos_token="<s>",
        **({"extra_special_tokens": tokens} if tokens else {}),
    )  # fmt: skip
    fast.model_input_names = ["input_ids", "attention_mask"]
    return fast


@lru_cache(1)
def tokenizer() -> Any:
    """The tokenizer without named tokens."""
    return named_tokenizer()


def _id(token: str) -> int:
    return tokenizer().convert_tokens_to_ids(token)


def _text(**extra: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": _id("<s>"),
        "eos_token_id": _id("</s>"),
        "pad_token_id": _id("<pad>"),
        **extra,
    }


def _clip(size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=size,
        patch_size=4,
    )


@dataclass
class Built:
    hf: Any
    processor: Any


def llava(size: int = 16, **config: Any) -> Built:
    """LLaVA: 4x4 visual tokens of a 16-pixel picture, layer -2, class token dropped."""
    hf = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=_clip(size),
            text_config=LlamaConfig(**_text()),
            image_token_index=_id("<image>"),
            vision_feature_layer=-2,
            **config,
        )
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
    )
    return Built(
        hf,
        LlavaProcessor(
            images,
            tokenizer(),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
        ),
    )


def llava_next(size: int = 16) -> Built:
    """LLaVA-NeXT: 16-pixel tiles, mosaics of 1x2, 2x1 and 2x2 tiles."""
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    hf = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=_clip(size),
            text_config=LlamaConfig(**_text()),
            image_token_index=_id("<image>"),
            vision_feature_layer=-2,
            image_grid_pinpoints=pinpoints,
        )
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_grid_pinpoints=pinpoints,
    )
    return Built(
        hf,
        LlavaNextProcessor(
            images,
            tokenizer(),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token="<image>",
        ),
    )


class Parts:
    """What Opsin reads of a processor, where the real class insists on packages that are not installed."""

    def __init__(self, images: Any, text: Any):
        self.image_processor, self.tokenizer = images, text


def _siglip(size: int, **extra: Any) -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": 4,
        **extra,
    }


def llava_onevision(size: int = 16) -> Built:
    """LLaVA-OneVision: mosaics of 1x2, 2x1 and 2x2 tiles of 4x4 patches, the largest shrunk to 5x5 tokens."""
    pinpoints = [[size, 2 * size], [2 * size, size], [2 * size, 2 * size]]
    hf = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**_siglip(size), vision_use_head=False),
            text_config=Qwen2Config(**_text()),
            image_token_index=_id("<image>"),
            video_token_index=_id("<video>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
            image_grid_pinpoints=pinpoints,
        )
    )
    images = LlavaOnevisionImageProcessor(
        size={"height": size, "width": size}, image_grid_pinpoints=pinpoints
    )
    return Built(
        hf,
        LlavaOnevisionProcessor(
            images,
            tokenizer(),
            LlavaOnevisionVideoProcessor(),
            num_image_tokens=(size // 4) ** 2,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
        ),
    )


def _idefics3(size: int, kind: str) -> Built:
    config, model, images, processor = {
        "idefics3": (
            Idefics3Config,
            Idefics3ForConditionalGeneration,
            Idefics3ImageProcessor,
            Idefics3Processor,
        ),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor, SmolVLMProcessor),
    }[kind]
    hf = model(
        config(
            vision_config=_siglip(2 * size),
            text_config=LlamaConfig(**_text()),
            image_token_id=_id("<image>"),
            scale_factor=2,
            pad_token_id=_id("<pad>"),
        )
    )
    made = images(size={"longest_edge": 4 * size}, max_image_size={"longest_edge": 2 * size})
    video = (SmolVLMVideoProcessor(),) if kind == "smolvlm" else ()
    try:
        whole = processor(made, tokenizer(), *video, image_seq_len=(size // 4) ** 2)
    except ImportError:  # SmolVLM's wants num2words
        whole = Parts(made, tokenizer())
    return Built(hf, whole)


def idefics3(size: int = 16) -> Built:
    """Idefics3: up to 2x2 tiles of 8x8 patches, merged 2x2, and the whole picture."""
    return _idefics3(size, "idefics3")


def smolvlm(size: int = 16) -> Built:
    """SmolVLM: like Idefics3, with classes of its own."""
    return _idefics3(size, "smolvlm")


def internvl(size: int = 16) -> Built:
    """InternVL: up to 4 tiles of 8x8 patches, merged 2x2, and a thumbnail."""
    side = 2 * size
    hf = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config={**_siglip(side), "image_size": [side, side], "patch_size": [4, 4]},
            text_config=Qwen2Config(**_text()),
            image_token_id=_id("<IMG_CONTEXT>"),
            image_seq_length=(size // 4) ** 2,
        )
    )
    images = GotOcr2ImageProcessor(
        size={"height": side, "width": side}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    named = named_tokenizer(
        start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    return Built(
        hf, InternVLProcessor(images, named, InternVLVideoProcessor(), image_seq_length=(size // 4) ** 2)
    )


def gemma3(size: int = 16) -> Built:
    """Gemma 3: 8x8 patches averaged to 4x4 tokens that see each other; every other layer sees 24 tokens; a soft cap of its
    language model, which the stock class ignores."""
    tokens = (size // 4) ** 2
    hf = Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=_siglip(2 * size, vision_use_head=False),
            text_config=Gemma3TextConfig(
                **_text(),
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=max(24, tokens),
                layer_types=["sliding_attention", "full_attention"] * 2,
                final_logit_softcapping=0.1,
            ),
            mm_tokens_per_image=tokens,
            boi_token_index=_id("<start_of_image>"),
            eoi_token_index=_id("<end_of_image>"),
            image_token_index=_id("<image_soft_token>"),
        )
    )
    images = Gemma3ImageProcessor(size={"height": 2 * size, "width": 2 * size})
    named = named_tokenizer(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    return Built(hf, Gemma3Processor(images, named, image_seq_length=tokens))


def _qwen_images(size: int) -> Any:
    least, most = size * size, (5 * size // 2) ** 2
    return Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=least, max_pixels=most,
        size={"shortest_edge": least, "longest_edge": most},
    )  # fmt: skip


def _qwen_text() -> dict[str, Any]:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
    return {**_text(), "rope_scaling": rope, "rope_theta": 10000.0}


def _qwen_tokens() -> dict[str, int]:
    return {
        "image_token_id": _id("<|image_pad|>"),
        "video_token_id": _id("<|video_pad|>"),
        "vision_start_token_id": _id("<|vision_start|>"),
        "vision_end_token_id": _id("<|vision_end|>"),
    }


def qwen2_vl(size: int = 16) -> Built:
    """Qwen2-VL: like Qwen2.5-VL, with full attention in every layer of the tower."""
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1,
        "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    hf = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=_qwen_text(), vision_config=vision, **_qwen_tokens())
    )
    return Built(hf, Parts(_qwen_images(size), tokenizer()))


def qwen2_5_vl(size: int = 16) -> Built:
    """Qwen2.5-VL: 4-pixel patches merged 2x2, native resolution (up to 2.5 x ``size`` squared), M-RoPE."""
    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **_qwen_tokens(),
    )
    return Built(Qwen2_5_VLForConditionalGeneration(config), Parts(_qwen_images(size), tokenizer()))


_LOUD = ("multi_modal_projector", "connector")

_MAKERS = {
    f.__name__: f
    for f in (llava, llava_next, qwen2_5_vl, llava_onevision, idefics3, smolvlm, internvl, qwen2_vl, gemma3)
}


def build(family: str, seed: int = 0, size: int = 16) -> Built:
    """A tiny model by Hugging Face model type; weights are a function of the seed.

    ``size``: pixels of a picture or tile; 32 gives 8x8 patches and more, on which blocks can be hidden.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = _MAKERS[family](size)
        # Visual tokens as loud as words, so that tests see an effect in few steps.
        for name, weight in built.hf.named_parameters():
            if any(part in name for part in _LOUD) and weight.ndim == 2:
                torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
        return built


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A PNG of blocks of random colours; ``size`` is (width, height)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def sample(
    seed: int, *, images: int = 1, turns: int = 1, independent: bool = False, size: tuple[int, int] = (20, 16)
) -> dict:
    """A stored sample with some pictures (all in the first turn) and some exchanges."""
    rng = np.random.default_rng(seed)
    conversation = []
    for t in range(turns):
        mark = "<image>\n" * images if t == 0 else ""
        colour = rng.choice(["red", "green", "blue", "yellow"])
        words = " ".join(rng.choice(["small", "large", "cube", "cone", "left", "object"], rng.integers(1, 9)))
        conversation.append({"from": "human", "value": f"{mark}What colour is the {words}? Answer briefly."})
        conversation.append({"from": "gpt", "value": f"It is {colour} number {seed}"})
    return {
        "id": f"zoo/{seed}",
        "conversations": conversation,
        "images": pack_images([picture(1000 * seed + i, size) for i in range(images)]),
        "meta": {"turns": "independent"} if independent else {},
    }
