"""How the weights that ship with ``scenes_llava`` were made: a language model and a vision tower, apart.

The language model learns the language of the scenes from captions and from questions about scenes described
in words, never from a question with a blanked picture, which would teach it to ignore pictures. The vision
tower is what a captioner leaves behind: tower, projector and a language model from scratch learn to caption,
and only the tower is kept (image captioners as vision learners: CapPa, arXiv 2306.07915). So a run starts
where LLaVA starts: with a tower that has seen and a language model that has read, and nothing between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from ..data.batch import split_batch
from ..data.collate import VLMCollator
from ..data.loader import build_encoder
from ..data.scenes import SceneConfig, sample
from ..models.vlm import VisionLanguageModel
from .fit import fit, group
from .models import scenes_llava

STREAMS = ("text", "text", "text_caption", "text_skill")
"""Streams of the language model in turn; half of the samples are questions about described scenes."""

SCENE_SEED = 1_000_000
"""Added to the seed: scenes of seeds that no dataset of ours uses."""

EASY_SHARE = 0.15
"""The captioner's first share of steps shows single objects: it leaves the plateau of the blind sooner."""


def train_language_model(
    out: Path, *, steps: int, seed: int, console: Console, batch_size: int = 48
) -> float:
    """Train it on text alone and write its weights as bfloat16 safetensors.

    Args:
        out: file to write.
        steps: optimizer steps of ``batch_size`` samples each.
        seed: of weights and scenes.
        console: progress.

    Returns:
        Mean loss of the last 50 steps, nats a labelled token.
    """
    model = scenes_llava(language_model=None, vision_tower=None, seed=seed)
    decoder: Any = model.hf.model.language_model
    collator = _collator(model, "vicuna_v1", packing=True)
    losses = _losses(model, _texts(seed, batch_size), collator)
    loss = fit([group(decoder.parameters(), 2e-3, 0.01)], losses, steps, console)
    model.end_step()
    _save(decoder, out, f"opsin data language-model --steps {steps} --seed {seed}")
    return loss


def train_vision_tower(out: Path, *, steps: int, seed: int, console: Console, batch_size: int = 16) -> float:
    """Train a captioner from scratch and write the weights of its tower as bfloat16 safetensors.

    Args, returns: as :func:`train_language_model`.
    """
    model = scenes_llava(language_model=None, vision_tower=None, seed=seed)
    samples = _captions(seed, batch_size, easy=int(EASY_SHARE * steps))
    losses = _losses(model, samples, _collator(model, "plain"))
    loss = fit([group(model.hf.parameters(), 3e-3)], losses, steps, console)
    model.end_step()
    _save(model.hf.model.vision_tower, out, f"opsin data vision-tower --steps {steps} --seed {seed}")
    return loss


def _collator(model: VisionLanguageModel, template: str, packing: bool = False) -> VLMCollator:
    encoder = build_encoder(
        model.processor, model.hf.config, template=template, system_prompt="", max_seq_len=512
    )
    return VLMCollator(encoder, packing=packing)


def _losses(
    model: VisionLanguageModel,
    batches: Iterable[list[dict[str, Any]]],
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> Callable[[int], Tensor]:
    """Step -> next-token loss on the next batch."""
    left = iter(batches)

    def loss_at(step: int) -> Tensor:
        batch = split_batch(collator(next(left)), None)[0]
        return model.loss(model(batch), batch)["lm"]

    model.train()
    return loss_at


def _save(module: Any, out: Path, made_by: str) -> None:
    state = {
        k: v.to(torch.bfloat16).contiguous() for k, v in module.state_dict().items() if v.is_floating_point()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata={"made_by": made_by})


def _texts(
    seed: int, batch_size: int, streams: Sequence[str] = STREAMS, config: SceneConfig | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Endless batches, streams in turn."""
    config = SceneConfig() if config is None else config
    index = 0
    while True:
        chunk = []
        for _ in range(batch_size):
            stream = streams[index % len(streams)]
            split = "train" if stream in ("text_skill", "blind") else "uniform"
            chunk.append(sample(config, SCENE_SEED + seed, split, index, stream))
            index += 1
        yield chunk


def _captions(seed: int, batch_size: int, easy: int) -> Iterator[list[dict[str, Any]]]:
    """Endless batches of captioned pictures, the first ``easy`` ones of single objects."""
    single, full = SceneConfig(objects=(1, 1), sign=0.0, charts=0.0), SceneConfig()
    step = 0
    while True:
        config = single if step < easy else full
        yield [
            sample(config, SCENE_SEED + seed, "uniform", step * batch_size + i, "caption")
            for i in range(batch_size)
        ]
        step += 1


def accuracy_on_text(model: VisionLanguageModel, samples: int = 200) -> float:
    """Exact-match accuracy on questions about described scenes (no picture), 0 .. 1."""
    from ..evaluation.packed import score

    asked = [sample(SceneConfig(), 99, "uniform", i, "text") for i in range(samples)]
    scored = score(model, _collator(model, "vicuna_v1"), asked)
    return sum(s.right for s in scored) / len(scored)
