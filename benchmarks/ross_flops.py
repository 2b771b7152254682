"""Floating-point operations of a training step with and without ROSS, counted on the meta device: no weights, no time.

The step is LLaVA's: a frozen tower (SigLIP so400m/14 at 384 pixels: 729 patches, the paper's), projector, language
model with gradients, its head at labelled positions; ROSS adds its head for K draws, with targets stored beside the
data. Sizes of the language models are those of the Qwen2 and Qwen2.5 families.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2Model, SiglipVisionConfig, SiglipVisionModel

from opsin.algorithms.ross.diffusion import objective_named
from opsin.algorithms.ross.functional import Draws, reconstruction_loss
from opsin.algorithms.ross.heads import make_head
from opsin.algorithms.ross.views import Views

GRID = (27, 27)
TOKENS, LABELLED, DIM = 1000, 100, 64
"""Tokens a sample, labelled ones, channels of a FLUX latent token after folding."""

LANGUAGE_MODELS: dict[str, dict[str, int]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip


def counted(work: Any) -> float:
    """Floating-point operations of a call, its backward passes included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


class Rotary(nn.Module):
    """Stands in for the tables of rotary positions (no operations worth counting): autocast knows no meta device."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.empty(1, x.shape[1], self.width, device=x.device)
        return table, table


def baseline(sizes: dict[str, int]) -> float:
    """One sample's step without ROSS."""
    with torch.device("meta"):
        width = sizes["hidden_size"]
        tower = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14,
            )
        ).requires_grad_(False)  # fmt: skip
        projector = nn.Sequential(nn.Linear(1152, width), nn.GELU(), nn.Linear(width, width))
        decoder = Qwen2Model(Qwen2Config(**sizes)).train()
        decoder.rotary_emb = Rotary(sizes["hidden_size"] // sizes["num_attention_heads"])
        head = nn.Linear(width, sizes["vocab_size"], bias=False)

        def step() -> None:
            with torch.no_grad():
                seen = tower(torch.empty(1, 3, 384, 384), output_hidden_states=True).hidden_states[-2]
            text = torch.empty(1, TOKENS - seen.shape[1], width)
            embeddings = torch.cat([projector(seen), text], 1)
            hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            head(hidden[0, -LABELLED:]).sum().backward()

        return counted(step)


def ross(
    width: int, head: nn.Module, draws: int, grid: tuple[int, int] = GRID, dim: int = DIM, images: int = 1
) -> float:
    """What ROSS adds for ``images`` pictures: the head for K draws, forward and backward, into the hidden states."""
    objective = objective_named("epsilon")
    views = Views.of([grid] * images, torch.device("meta"))
    count = images * grid[0] * grid[1]
    with torch.device("meta"):
        noise = Draws(torch.empty(draws, images, dtype=torch.int64), torch.empty(draws, count, dim))

        def step() -> None:
            hidden = torch.empty(count, width, requires_grad=True)
            reconstruction_loss(
                head, hidden, torch.empty(count, dim), views, objective, noise, torch.empty(1000)
            ).sum().backward()

        return counted(step)


def table() -> list[dict[str, Any]]:
    """Ratios for all sizes, draws and denoisers."""
    found = []
    for name, sizes in LANGUAGE_MODELS.items():
        base = baseline(sizes)
        for width in (None, "scaled"):
            with torch.device("meta"):
                head = make_head("dit", sizes["hidden_size"], DIM, width=width)
            for draws in (1, 4):
                added = ross(sizes["hidden_size"], head, draws)
                found.append(
                    {
                        "language_model": name,
                        "denoiser_width": head.width,
                        "draws": draws,
                        "baseline_TFLOP": base / 1e12,
                        "ross_TFLOP": added / 1e12,
                        "ratio": 1 + added / base,
                    }
                )
    return found


if __name__ == "__main__":
    for row in table():
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
