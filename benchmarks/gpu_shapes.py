"""Models of the size that GPUs train, random weights made on the device, and batches that every method can use."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from shapes import SCENES, Built, build
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from opsin.data.scenes import sample, vocabulary
from opsin.data.schema import IMAGE_MARK
from opsin.models.tiny import llava_processor, word_tokenizer

CLIP_L = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """What is trained, on what.

    Attributes:
        rows, length: samples a step, and tokens of each.
        burst: steps that are timed in one go.
        dtype: of the weights.
        note: for the table.
    """

    rows: int
    length: int
    burst: int
    dtype: torch.dtype = torch.float32
    note: str = ""


SHAPES = {
    "toy": Shape(2, 160, 2, note="a LLaVA of a million parameters, to rehearse"),
    "smollm2-135m": Shape(16, 768, 6, note="SmolLM2-135M behind a small tower, 256 patches"),
    "0.5b": Shape(8, 1024, 4, note="Qwen2-0.5B behind CLIP-L/14-336, 576 patches"),
    "7b": Shape(4, 1024, 2, torch.bfloat16, "Vicuna-7B behind CLIP-L/14-336, 576 patches; weights in bf16"),
}


def build_shape(name: str, device: str) -> Built:
    """One of ``SHAPES``, in training mode on ``device``."""
    if name == "toy":
        return build("toy", device)
    if name == "smollm2-135m":
        return build("smollm2-135m", device, image_size=128)
    tokenizer: Any = word_tokenizer(vocabulary(SCENES))
    special = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "0.5b":
        text: Any = Qwen2Config(
            vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=4096, **special,
        )  # fmt: skip
    else:
        text = LlamaConfig(
            vocab_size=32_064, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=4096, tie_word_embeddings=False, **special,
        )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(SHAPES[name].dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            hf = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    for (
        parameter
    ) in hf.parameters():  # whatever the library has made of the default; buffers stay as they are
        parameter.data = parameter.data.to(SHAPES[name].dtype)
    return Built(name, hf.train(), llava_processor(tokenizer, 336, 14), burst=SHAPES[name].burst)


def prompt_batch(
    built: Built, rows: int, length: int, *, labelled: float = 0.15, instruction: float = 0.1
) -> tuple[dict[str, torch.Tensor], str]:
    """``rows`` full rows of a picture, the same prompt and an answer each; and the prompt.

    One prompt for all, so that ViFT can be told that it may stand beside a picture, and L2T has it to learn.

    Args:
        built: the model.
        rows: samples.
        length: tokens of each.
        labelled: share of the tokens that the answer has, its end included.
        instruction: share of the tokens that the prompt has; the rest is picture and system text.
    """
    collate = built.collator(length)
    plain = [w for w in vocabulary(SCENES) if w.isalpha()]
    prompt = " ".join(random.Random(0).choices(plain, k=round(length * instruction)))
    answer = round(length * labelled) - 1

    def conversation(index: int, system: int) -> dict[str, Any]:
        draw = random.Random(index)
        record = sample(SCENES, 0, "train", index)
        record["conversations"] = [
            {"from": "system", "value": " ".join(draw.choices(plain, k=system))},
            {"from": "human", "value": f"{IMAGE_MARK}\n{prompt}"},
            {"from": "gpt", "value": " ".join(draw.choices(plain, k=answer))},
        ]
        return record

    around = len(collate.encoder(conversation(0, 1))) - 1
    if around >= length:
        raise SystemExit(f"shares leave no room: {around} tokens without system text, length {length}")
    batch = collate([conversation(i, length - around) for i in range(rows)])
    assert batch["input_ids"].shape == (rows, length) and bool(batch["attention_mask"].all())
    return batch, prompt
