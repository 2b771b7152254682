"""How the auto-encoder of ``target: autoencoder`` was made: pictures of scenes in, the same pictures out.

Two things make its latents good targets. Pixels of objects weigh more than wall and floor, of which there are
ten times as many: without it, a picture of 25 dB has all its shapes and grey objects. And the decoder reads
latents that were standardised over the batch and then disturbed a little, so what differs between pictures
cannot hide in directions of hardly any variance, where no denoiser would find it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from ..algorithms.ross.targets.patches import PatchAutoencoder
from ..data.scenes import SceneConfig, scene
from .fit import fit, group

SCENE_SEED = 1_000_000
"""Added to the seed: scenes of seeds that no dataset of ours uses."""

_PEAK = 2e-3  # learning rate; 3e-3 diverged at width 64
_NOISE = 0.1  # deviation of what is added to standardised latents
_OBJECTS = 4.0  # an object's pixel weighs one more than this
_MEASURED = 1024  # scenes over which mean and deviation are taken


def train_autoencoder(
    out: Path, *, steps: int, seed: int, console: Console, batch_size: int = 16, size: int = 64
) -> float:
    """Train it and write weights as bfloat16, mean and deviation of its latents as float32, to a safetensors file.

    Args:
        out: file to write.
        steps: optimizer steps of ``batch_size`` pictures each.
        seed: of weights, noise and scenes.
        console: progress.
        size: side of the pictures in pixels.

    Returns:
        Mean loss of the last 50 steps: absolute plus squared error in units of half the range of a channel.
    """
    config = SceneConfig(size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PatchAutoencoder()
        losses = _losses(model, config, SCENE_SEED + seed, batch_size)
        loss = fit([group(model.parameters(), _PEAK)], losses, steps, console, betas=(0.9, 0.99))
    _finish(model, config, SCENE_SEED + seed, first=steps * batch_size)
    state = {
        name: value.contiguous() if name in ("mean", "std") else value.to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata={"made_by": f"opsin data autoencoder --steps {steps} --seed {seed}"})
    return loss


def _losses(
    model: PatchAutoencoder, config: SceneConfig, scene_seed: int, batch_size: int
) -> Callable[[int], torch.Tensor]:
    """Step -> loss on the next pictures."""

    def loss_at(step: int) -> torch.Tensor:
        pictures, objects = _batch(config, scene_seed, step * batch_size, batch_size)
        latents = model.raw(pictures)
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
        latents = (latents - mean) / deviation.clamp_min(1e-5)
        said = model.decode(latents + _NOISE * torch.randn_like(latents))
        return distance(said, pictures, 1 + _OBJECTS * objects)

    return loss_at


def distance(said: torch.Tensor, pictures: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Absolute plus squared error, a weighted mean over pixels: (B, 3, H, W) twice and (B, 1, H, W)."""
    error = said - pictures
    return ((error.abs() + error.square()) * weight).sum() / (3 * weight.sum())


@torch.no_grad()
def _finish(model: PatchAutoencoder, config: SceneConfig, scene_seed: int, first: int) -> None:
    """Round the weights as they will be stored, then measure the latents that the rounded weights give."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
    latents = torch.cat(
        [model.raw(_batch(config, scene_seed, first + i, 64)[0]) for i in range(0, _MEASURED, 64)]
    )
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
    model.get_buffer("mean").copy_(mean)
    model.get_buffer("std").copy_(deviation)


def _batch(config: SceneConfig, scene_seed: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, H, W) in [-1, 1]; (B, 1, H, W) 1 where an object or a chart's bar is seen, else 0."""
    scenes = [scene(config, scene_seed, "uniform", first + i) for i in range(count)]
    pictures = torch.from_numpy(np.stack([np.asarray(s.picture) for s in scenes]))
    objects = torch.from_numpy(np.stack([s.masks for s in scenes]))
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1, (objects[:, None] > 0).float()
