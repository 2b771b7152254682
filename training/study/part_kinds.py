"""Frozen parts that studies are made of, trained from nothing but scenes: each kind is a function that writes a folder.

What they must know, and must not, is held by ``opsin study check``:

* ``language_model``: a Llama that has read captions, questions about scenes told in words, questions without any scene (so
  it has the habits of the training set), and two skills that are never asked about a picture. It has no image slots.
* ``context_tower``: a CNN that learnt which words a caption has, whatever their order: what there is, not where.
* ``dense_tower``: a ViT of another width that learnt for each patch what is seen there: a teacher for JARVIS.
* ``autoencoder``: pictures to latents and back: a target for ROSS (the one that ships, trained anew).

All but the last are ordinary Hugging Face folders.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.scenes import COLOURS, SHAPES, SIZES, Scene, SceneConfig, sample, scene
from ...data.scenes.facts import SceneObject
from ...models.tiny import IMAGE_MEAN, IMAGE_STD
from ..fit import fit, group

SCENE_SEED = 1_500_000
"""Added to a part's seed: scenes of seeds that no dataset, no other training and no audit of ours uses."""

OBJECTS = (1, 3)
BINS = 6
"""Classes into which the dense tower sorts the place of an object, from left to right and from near to far."""
_PICTURES = SceneConfig(objects=OBJECTS, sign=0.0, charts=0.0)


def language_model(
    out: Path, console: Console, *, steps: int = 150, seed: int = 0, start: str | None = "shipped", lr: float = 1e-3,
    batch_size: int = 32, hidden_size: int = 128, heads: int = 4,
) -> None:  # fmt: skip
    """Train a small Llama on text alone.

    Args:
        out: folder for model and tokenizer.
        console: progress.
        steps: optimizer steps of ``batch_size`` samples each.
        seed: of weights and scenes.
        start: weights to go on from; None: random ones, which need some 1,500 steps.
        lr: peak learning rate.
        batch_size: samples a step.
        hidden_size, heads: of the model; what ships has 128 and 4, so another width needs ``start: null``.
    """
    from transformers import LlamaForCausalLM

    from ..models import scenes_llava
    from ..pretrain import _collator, _losses, _texts

    model = scenes_llava(
        language_model=start, vision_tower=None, hidden_size=hidden_size, heads=heads, seed=seed
    )
    decoder: Any = model.hf.model.language_model
    texts = _texts(SCENE_SEED + seed, batch_size, streams=STREAMS, config=_PICTURES)
    spoken, plain = (_collator(model, template, packing=True) for template in ("vicuna_v1", "plain"))
    number = itertools.count()

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        # In the first stage captions stand alone, so it reads some that do.
        if next(number) % 4 == 3:
            return plain([s for s in samples if s["meta"]["stream"] == "text_caption"])
        return spoken(samples)

    fit([group(decoder.parameters(), lr, 0.01)], _losses(model, texts, collate), steps, console)
    model.end_step()
    with torch.random.fork_rng(devices=[]):
        whole: Any = LlamaForCausalLM(model.hf.config.text_config)
    whole.model.load_state_dict(decoder.state_dict())
    whole.tie_weights()
    whole.generation_config = model.hf.generation_config
    whole.save_pretrained(out)
    cast(Any, model.processor).tokenizer.save_pretrained(out)


STREAMS = ("text", "text_caption", "blind", "text_skill")
"""Streams of :func:`language_model` in turn; the last two are of split ``train``, whose habits it is to have."""


def context_tower(
    out: Path, console: Console, *, steps: int = 600, seed: int = 0, architecture: str = "lcnet_050", stage: int = 2,
    lr: float = 2e-3, batch_size: int = 32,
) -> None:  # fmt: skip
    """Train a CNN to tell which words a picture's caption has: each patch votes for each word, the loudest votes count.

    Args:
        out: folder for the tower (``opsin_token_tower``) and its image processor.
        console: progress.
        steps: optimizer steps of ``batch_size`` pictures each.
        seed: of weights and scenes.
        architecture: of timm.
        stage: its map of 8 x 8 pixels a token.
        lr: peak learning rate.
        batch_size: pictures a step.
    """
    from ...models.towers import TokenTower

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = _PICTURES.size
        tower = TokenTower.from_timm(
            architecture, None, image_size=size, stages=[stage], standardise=True
        ).train()
        words = {w: i for i, w in enumerate((*COLOURS, *SHAPES, *SIZES))}
        head = nn.Linear(tower.config.hidden_size, len(words))

        def loss(scenes: list[Scene], texts: list[str]) -> Tensor:
            # Plural forms do not occur in captions of single objects; a word is there or is not.
            told = torch.zeros(len(texts), len(words))
            for row, text in enumerate(texts):
                told[row, [words[w] for w in set(re.findall(r"\w+", text)) & words.keys()]] = 1
            votes = head(tower(pixels(scenes)).last_hidden_state)
            return F.binary_cross_entropy_with_logits(votes.logsumexp(1) - math.log(votes.shape[1]), told)

        _fit_pictures([*tower.parameters(), *head.parameters()], loss, seed, steps, batch_size, lr, console)
        tower.eval()
        maps = _tokens(tower, seed + 1)
        std, mean = torch.std_mean(maps, dim=0)
        tower.set_statistics(mean, std)
    tower.save_pretrained(out)
    _processor(size).save_pretrained(out)


def dense_tower(
    out: Path, console: Console, *, steps: int = 600, seed: int = 1, width: int = 64, layers: int = 3, patch_size: int = 8,
    lr: float = 2e-3, batch_size: int = 32,
) -> None:  # fmt: skip
    """Train a ViT to tell of each patch what object covers most of it, or that none does: its attributes and where it stands.

    Args:
        out: folder for the tower (``CLIPVisionModel``) and its image processor.
        console: progress.
        steps: optimizer steps of ``batch_size`` pictures each.
        seed: of weights and scenes.
        width, layers, patch_size: of the tower.
        lr: peak learning rate.
        batch_size: pictures a step.
    """
    from transformers import CLIPVisionModel

    from ...models.tiny import tiny_vision_config

    kinds: dict[str, Callable[[SceneObject], int]] = {
        "colour": lambda o: COLOURS.index(o.colour),
        "shape": lambda o: SHAPES.index(o.shape),
        "size": lambda o: SIZES.index(o.size),
        "x": lambda o: min(BINS - 1, int(o.x * BINS)),
        "depth": lambda o: min(BINS - 1, int(o.depth * BINS)),
    }
    classes = [len(COLOURS) + 1, len(SHAPES) + 1, len(SIZES) + 1, BINS + 1, BINS + 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = _PICTURES.size
        tower: Any = CLIPVisionModel(tiny_vision_config(size, patch_size, width, layers)).train()
        head = nn.Linear(width, sum(classes))

        def loss(scenes: list[Scene], _: list[str]) -> Tensor:
            covered = torch.from_numpy(np.stack([s.masks for s in scenes])).long()
            cells = F.one_hot(covered, OBJECTS[1] + 1).float().permute(0, 3, 1, 2)
            share = F.avg_pool2d(cells, patch_size).flatten(2)  # (B, objects + 1, P)
            most = share[:, 1:].max(1)
            seen = torch.where(most.values > 0.25, most.indices + 1, 0)  # (B, P), 0: none
            said = head(tower(pixels(scenes)).last_hidden_state[:, 1:]).split(classes, -1)
            total = torch.zeros(())
            for number, logits in zip(kinds.values(), said, strict=True):
                table = torch.zeros(len(scenes), OBJECTS[1] + 1, dtype=torch.long)
                for row, one in enumerate(scenes):
                    values = [number(o) + 1 for o in one.objects]
                    table[row, 1 : len(values) + 1] = torch.tensor(values)
                label = table.gather(1, seen)
                weight = torch.where(label > 0, 1.0, 0.2)  # most patches show no object
                each = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none")
                total = total + (each * weight.flatten()).sum() / weight.sum()
            return total

        _fit_pictures([*tower.parameters(), *head.parameters()], loss, seed, steps, batch_size, lr, console)
    tower.eval().save_pretrained(out)
    _processor(size).save_pretrained(out)


def autoencoder(out: Path, console: Console, *, steps: int = 1200, seed: int = 0) -> None:
    """Train the auto-encoder of ``algorithms.ross.target: autoencoder``; ``weights`` is ``OUT/model.safetensors``."""
    from ..autoencoder import train_autoencoder

    train_autoencoder(out / "model.safetensors", steps=steps, seed=seed, console=console)


def pixels(scenes: list[Scene]) -> Tensor:
    """(B, 3, H, W) float32, normalised as the towers' image processor does it."""
    stacked = torch.from_numpy(np.stack([np.asarray(s.picture) for s in scenes])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return (stacked.float() / 255 - mean) / std


def _processor(size: int) -> Any:
    from ...models.tiny import llava_processor, word_tokenizer

    return cast(Any, llava_processor(word_tokenizer(["a"]), size, 8)).image_processor


@torch.no_grad()
def _tokens(tower: nn.Module, seed: int, batches: int = 16) -> Tensor:
    """(n, C): raw tokens of held-out scenes."""
    found = []
    for _, (scenes, _) in zip(range(batches), _batches(seed, 64), strict=False):
        found.append(cast(Any, tower)(pixels(scenes)).last_hidden_state.flatten(0, 1))
    return torch.cat(found)


def _batches(seed: int, batch_size: int) -> Iterator[tuple[list[Scene], list[str]]]:
    """Endless batches: scenes, and what their captions say."""
    index = 0
    while True:
        numbers = range(index, index + batch_size)
        index += batch_size
        seeded = SCENE_SEED + seed
        told = [sample(_PICTURES, seeded, "uniform", i, "text_caption") for i in numbers]
        yield (
            [scene(_PICTURES, seeded, "uniform", i) for i in numbers],
            [t["conversations"][1]["value"] for t in told],
        )


def _fit_pictures(
    parameters: list[nn.Parameter], loss_of: Callable[[list[Scene], list[str]], Tensor], seed: int, steps: int,
    batch_size: int, lr: float, console: Console,
) -> None:  # fmt: skip
    batches = _batches(seed, batch_size)
    fit([group(parameters, lr, 0.01)], lambda step: loss_of(*next(batches)), steps, console)


KINDS: dict[str, Callable[..., None]] = {
    "language_model": language_model,
    "context_tower": context_tower,
    "dense_tower": dense_tower,
    "autoencoder": autoencoder,
}
"""Name in ``parts.NAME.kind`` -> what trains it."""
