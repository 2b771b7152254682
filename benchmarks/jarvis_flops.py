"""Floating-point operations of a training step with and without JARVIS, counted on the meta device: no weights, no time.

The step is the paper's: CLIP-L/14 at 336 pixels (24x24 patches), projector, language model, its head at labelled
positions. JARVIS adds DINOv2-L on the same picture (unless its features are stored), its head at the targets, and where
words see the whole image (``text_loss: unmasked``) a second pass of context and targets through the first quarter of the
layers. Sizes of the language models as in ``ross_flops.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from ross_flops import LANGUAGE_MODELS, Rotary, counted
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, Qwen2Config, Qwen2Model

from opsin.algorithms.jarvis.heads import TargetHead

PATCHES, TOKENS, LABELLED, DIM = 24 * 24, 640, 60, 1024
"""Patches of a picture; tokens a sample, labelled ones; channels of a DINOv2-L feature."""
TARGETS, CONTEXT = 0.45, 0.45
"""Shares of the patches that are predicted, and that remain as context (defaults, counted over many draws)."""

TRAINED = {"all": True, "proj": False}
"""``train`` -> whether the language model is trained."""


def decoder_of(sizes: dict[str, int], layers: int, trained: bool) -> nn.Module:
    """The language model's body with some of its layers, on the meta device."""
    with torch.device("meta"):
        decoder = Qwen2Model(Qwen2Config(**{**sizes, "num_hidden_layers": layers})).train()
        decoder.rotary_emb = Rotary(sizes["hidden_size"] // sizes["num_attention_heads"])
    return decoder.requires_grad_(trained)


def passed(decoder: nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
    """Output of the last layer."""
    return decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state


def baseline(sizes: dict[str, int], trained: bool) -> float:
    """One sample's step without JARVIS."""
    width = sizes["hidden_size"]
    decoder = decoder_of(sizes, sizes["num_hidden_layers"], trained)
    with torch.device("meta"):
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14,
            )
        ).requires_grad_(False)  # fmt: skip
        projector = nn.Sequential(nn.Linear(1024, width), nn.GELU(), nn.Linear(width, width))
        head = nn.Linear(width, sizes["vocab_size"], bias=False).requires_grad_(trained)

        def step() -> None:
            with torch.no_grad():
                states = tower(torch.empty(1, 3, 336, 336), output_hidden_states=True).hidden_states
            text = torch.empty(1, TOKENS - PATCHES, width)
            hidden = passed(decoder, torch.cat([projector(states[-2][:, 1:]), text], 1))
            head(hidden[0, -LABELLED:]).sum().backward()

        return counted(step)


def teacher() -> float:
    """DINOv2-L on one picture of 336 pixels."""
    with torch.device("meta"):
        config = Dinov2Config(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
        )
        network = Dinov2Model(config).eval().requires_grad_(False)
        return counted(lambda: network(torch.empty(1, 3, 336, 336)))


def head(width: int, targets: int = round(TARGETS * PATCHES), dim: int = DIM) -> float:
    """The head at the targets, forward and backward, into the hidden states."""
    with torch.device("meta"):
        predict = TargetHead("mlp", width, dim)
        return counted(lambda: predict(torch.empty(targets, width, requires_grad=True)).sum().backward())


def second_pass(sizes: dict[str, int], trained: bool) -> float:
    """Context and targets of one picture through the first quarter of the layers, forward and backward."""
    layers = sizes["num_hidden_layers"] // 4
    decoder = decoder_of(sizes, layers, trained)
    tokens = round((TARGETS + CONTEXT) * PATCHES)
    with torch.device("meta"):
        embeddings = torch.empty(1, tokens, sizes["hidden_size"], requires_grad=True)
    return counted(lambda: passed(decoder, embeddings).sum().backward())


def table() -> list[dict[str, Any]]:
    """Ratios to the step without JARVIS."""
    found, seen = [], teacher()
    for name, sizes in LANGUAGE_MODELS.items():
        own = head(sizes["hidden_size"])
        for train, trained in TRAINED.items():
            base, again = baseline(sizes, trained), second_pass(sizes, trained)
            found.append(
                {
                    "language_model": name,
                    "train": train,
                    "baseline_TFLOP": base / 1e12,
                    "teacher_TFLOP": seen / 1e12,
                    "head_TFLOP": own / 1e12,
                    "second_pass_TFLOP": again / 1e12,
                    "teacher_share": seen / base,
                    "masked_stored": 1 + own / base,
                    "masked_online": 1 + (own + seen) / base,
                    "unmasked_stored": 1 + (own + again) / base,
                    "unmasked_online": 1 + (own + again + seen) / base,
                }
            )
    return found


if __name__ == "__main__":
    for row in table():
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
