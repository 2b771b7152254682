"""How the language model that ships with ``scenes_llava`` was made: on text alone.

It learns the language of the scenes from captions and from questions about scenes described in words, never
from a question with a blanked picture, which would teach it to ignore pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from ..data.batch import split_batch
from ..data.collate import VLMCollator
from ..data.loader import build_encoder
from ..data.scenes import SceneConfig, sample
from ..models.vlm import VisionLanguageModel
from .models import scenes_llava

STREAMS = ("text", "text", "text_caption", "text_skill")
"""Streams in turn; half of the samples are questions about described scenes."""


def train_language_model(
    out: Path, *, steps: int, seed: int, console: Console, batch_size: int = 48
) -> float:
    """Train it and write its weights as bfloat16 safetensors.

    Args:
        out: file to write.
        steps: optimizer steps of ``batch_size`` samples each.
        seed: of weights and scenes (scenes of other seeds than any evaluation set uses).
        console: progress.

    Returns:
        Mean loss of the last 100 steps, nats a labelled token.
    """
    torch.manual_seed(seed)
    model = scenes_llava(language_model=None, seed=seed)
    decoder: Any = model.hf.model.language_model
    encoder = build_encoder(
        model.processor, model.hf.config, template="vicuna_v1", system_prompt="", max_seq_len=512
    )
    collator = VLMCollator(encoder, packing=True)
    peak = 2e-3
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / steps))),
    )
    model.train()
    losses, started = [], time.time()
    for step, samples in zip(range(steps), _samples(seed, batch_size), strict=False):
        batch = split_batch(collator(samples), None)[0]
        loss = model.loss(model(batch), batch)["lm"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            console.print(f"step {step + 1}/{steps}  loss {recent:.3f}  {time.time() - started:.0f} s")
    model.end_step()
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in decoder.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata={"made_by": f"opsin data language-model --steps {steps} --seed {seed}"})
    tail = losses[-100:]
    return sum(tail) / len(tail)


def _samples(seed: int, batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Endless batches, streams in turn; scenes of a seed that no dataset of ours uses."""
    config = SceneConfig()
    index = 0
    while True:
        chunk = []
        for _ in range(batch_size):
            stream = STREAMS[index % len(STREAMS)]
            chunk.append(
                sample(
                    config, 1_000_000 + seed, "train" if stream == "text_skill" else "uniform", index, stream
                )
            )
            index += 1
        yield chunk


def accuracy_on_text(model: VisionLanguageModel, samples: int = 200) -> float:
    """Exact-match accuracy on questions about described scenes (no picture), 0 .. 1."""
    from ..evaluation.packed import score

    encoder = build_encoder(
        model.processor, model.hf.config, template="vicuna_v1", system_prompt="", max_seq_len=512
    )
    asked = [sample(SceneConfig(), 99, "uniform", i, "text") for i in range(samples)]
    scored = score(model, VLMCollator(encoder), asked)
    return sum(s.right for s in scored) / len(scored)
