"""Tiny random models of real architectures, with matching processors; built from config classes, no download."""

from __future__ import annotations

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
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from opsin.data.schema import pack_images

FAMILIES = ("llava", "llava_next", "qwen2_5_vl")

SPECIALS = [
    "<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

CORPUS = [
    "What colour is the large cube to the left of the small red cone? Answer briefly.",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
    "system user assistant Describe the picture in one sentence. There are 12 objects: a small blue sphere.",
    "Is there a green cylinder? yes no red green blue yellow small large left right one two three",
]


@lru_cache(1)
def tokenizer() -> Any:
    """Byte-level BPE of about 400 entries, with every special token of the three families."""
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
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    fast.model_input_names = ["input_ids", "attention_mask"]
    return fast


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


class _QwenProcessor:
    """What Opsin reads of Qwen2_5_VLProcessor; the real class insists on a video processor with more packages."""

    def __init__(self, images: Any, text: Any):
        self.image_processor, self.tokenizer = images, text


def qwen2_5_vl(size: int = 16) -> Built:
    """Qwen2.5-VL: 4-pixel patches merged 2x2, native resolution (up to 2.5 x ``size`` squared), M-RoPE."""
    from transformers import Qwen2VLImageProcessor

    config = Qwen2_5_VLConfig(
        text_config={
            **_text(),
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
            "rope_theta": 10000.0,
        },
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
        image_token_id=_id("<|image_pad|>"),
        video_token_id=_id("<|video_pad|>"),
        vision_start_token_id=_id("<|vision_start|>"),
        vision_end_token_id=_id("<|vision_end|>"),
    )
    hf = Qwen2_5_VLForConditionalGeneration(config)
    least, most = size * size, (5 * size // 2) ** 2
    images = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=least, max_pixels=most,
        size={"shortest_edge": least, "longest_edge": most},
    )  # fmt: skip
    return Built(hf, _QwenProcessor(images, tokenizer()))


def build(family: str, seed: int = 0, size: int = 16) -> Built:
    """A tiny model by Hugging Face model type; weights are a function of the seed.

    ``size``: pixels of a picture or tile; 32 gives 8x8 patches and more, on which blocks can be hidden.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = {"llava": llava, "llava_next": llava_next, "qwen2_5_vl": qwen2_5_vl}[family](size)
        projector = getattr(built.hf.model, "multi_modal_projector", None)
        if projector is not None:  # visual tokens as loud as words, so that tests see an effect in few steps
            for layer in (projector.linear_1, projector.linear_2):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
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
