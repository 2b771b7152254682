"""A LLaVA of about a million parameters that trains on a laptop: for demonstrations and tests of whole runs.

A word-level tokenizer over a given vocabulary, a small vision transformer and a small Llama, all of them real
Hugging Face classes: what is exported loads with ``LlavaForConditionalGeneration.from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<pad>", "<unk>", "<image>", "<|im_start|>", "<|im_end|>")
IMAGE_MEAN, IMAGE_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
"""Of a colour, by which pictures are normalised for the tower."""


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words and single punctuation marks; a space belongs to the word behind it.

    Text made of ``words``, single spaces and line breaks survives a round trip; other words become ``<unk>``.
    """
    roles = ("system", "user", "assistant")
    pieces = sorted({*words, *roles, "\n"})
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for piece in pieces:
        for form in (piece, f"▁{piece}") if piece != "\n" else (piece,):
            vocabulary.setdefault(form, len(vocabulary))
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\w+|▁?[^\w\s▁]|\n|▁"), "isolated")
    raw.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")])
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def tiny_vision_config(image_size: int, patch_size: int, width: int, layers: int) -> CLIPVisionConfig:
    """Configuration of the CLIP-style tower of :func:`tiny_llava`."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        image_size=image_size,
        patch_size=patch_size,
    )


def tiny_llava(
    words: Sequence[str],
    *,
    image_size: int = 64,
    patch_size: int = 8,
    vision_width: int = 96,
    vision_layers: int = 2,
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    max_position_embeddings: int = 1024,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA-architecture model and its processor; random weights, a function of ``seed`` alone.

    Args:
        words: the vocabulary (special tokens and role names are added).
        image_size, patch_size: pixels; (image_size / patch_size) ** 2 visual tokens.
        vision_width, vision_layers: of the CLIP-style tower; the output of the layer before the last is
            used, class token dropped, as in LLaVA.
        hidden_size, layers, heads: of the Llama language model.
    """
    tokenizer: Any = word_tokenizer(words)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 8 * hidden_size // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=tiny_vision_config(image_size, patch_size, vision_width, vision_layers),
        text_config=LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = LlavaForConditionalGeneration(config)
        # Visual tokens that start as loud as words are learnt from at once; Hugging Face's 0.02 whispers.
        for layer in (hf.model.multi_modal_projector.linear_1, hf.model.multi_modal_projector.linear_2):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    generation: Any = hf.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return hf, llava_processor(tokenizer, image_size, patch_size)


def llava_processor(tokenizer: Any, image_size: int, patch_size: int) -> LlavaProcessor:
    """Processor for a square picture of ``image_size`` pixels and a tower with one class token."""
    side = {"height": image_size, "width": image_size}
    images = CLIPImageProcessor(
        do_resize=True,
        size=side,
        do_center_crop=False,
        crop_size=side,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
