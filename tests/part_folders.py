"""Folders of tiny random parts of a LLaVA: vision towers of every kind, language models with their tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
)

import zoo

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT_HALF: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 9,
}
MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.25, 0.27]
CHAT = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
VIT = "test_vit"


def text_tokenizer(image_token: bool = False) -> Any:
    """The zoo's tokenizer as a language model brings it: without an image token, without padding."""
    raw = json.loads(zoo.tokenizer().backend_tokenizer.to_str())
    if not image_token:
        raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<image>"]
        for i, token in enumerate(raw["added_tokens"]):
            token["id"] = min(t["id"] for t in raw["added_tokens"]) + i
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT
    return fast


def write_text(folder: Path, kind: str, spare: int = 0, tied: bool = False) -> Path:
    """A language model's folder; ``spare`` rows of embeddings beyond the tokenizer's."""
    fast = text_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(fast) + spare,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "bos_token_id": fast.bos_token_id,
        "eos_token_id": fast.eos_token_id,
        "pad_token_id": None,
    }
    torch.manual_seed(3)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**common)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**common)),
        "phi": lambda: PhiForCausalLM(PhiConfig(**common)),
    }[kind]()
    made.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_tower(folder: Path, kind: str, **vision: Any) -> Path:
    """A vision tower's folder; ``vision``: other values of its configuration."""
    import timm

    torch.manual_seed(4)
    config = {**VISION, **vision}
    if kind == "timm":
        net = timm.create_model(VIT, num_classes=0)
        folder.mkdir()
        cfg = {"input_size": [3, 160, 160], "mean": MEAN, "std": STD}
        (folder / "config.json").write_text(json.dumps({"architecture": VIT, "pretrained_cfg": cfg}))
        save_file(net.state_dict(), folder / "model.safetensors")
        return folder
    made: Any = {
        "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT_HALF, vision_config=config, projection_dim=4)),
        "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT_HALF, vision_config=config)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**{**config, "mlp_ratio": 2})),
    }[kind]()
    made.save_pretrained(folder)
    CLIPImageProcessor(image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return folder
