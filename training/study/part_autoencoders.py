"""Auto-encoders of diffusers, trained on nothing but scenes: targets of ROSS that are made as the paper's are.

* ``kl_autoencoder``: an ``AutoencoderKL``, for ``algorithms.ross.target: {name: vae, path: OUT}``.
* ``vq_autoencoder``: a ``VQModel``, for ``{name: vq, path: OUT, fold: 2}``.

Both have a latent for 4 x 4 pixels, so a token of ``fold`` 2 stands for 8 x 8. As in :mod:`..autoencoder`, pixels of objects
weigh more than wall and floor. Latents and code vectors have deviation 1 when they are done: denoising begins with noise of that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ...data.scenes import SceneConfig
from ..autoencoder import _batch, distance
from ..fit import fit, group
from .part_kinds import SCENE_SEED

OBJECTS = 4.0
"""An object's pixel weighs one more than this."""
MEASURED = 256
"""Scenes over which mean and deviation of latents are taken."""
REVIVED = 25
"""Steps after which code vectors that no latent chose are laid on latents."""
_PICTURES = SceneConfig(sign=0.0, charts=0.0)


def kl_autoencoder(
    out: Path, console: Console, *, steps: int = 400, seed: int = 0, channels: int = 8, kl: float = 1e-3, lr: float = 2e-3,
    batch_size: int = 16,
) -> None:  # fmt: skip
    """Train a small ``AutoencoderKL``; its configuration holds mean and deviation of each channel.

    Args:
        out: folder.
        console: progress.
        steps: optimizer steps of ``batch_size`` pictures each.
        seed: of weights, noise and scenes.
        channels: of a latent.
        kl: weight of the divergence, a mean over the numbers of a latent map, in nats.
        lr: peak learning rate.
        batch_size: pictures a step.
    """
    from diffusers import AutoencoderKL  # type: ignore[attr-defined]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderKL(**_shape(channels), sample_size=_PICTURES.size).train()

        def loss(pictures: Tensor, weight: Tensor, step: int) -> Tensor:
            found = vae.encode(pictures).latent_dist
            divergence = found.kl() / found.mean[0].numel()  # (B,) sums of diffusers -> means
            return distance(vae.decode(found.sample()).sample, pictures, weight) + kl * divergence.mean()

        _fit(vae.parameters(), loss, seed, steps, batch_size, lr, console)
        vae.eval()
        latents = _held_out(
            lambda pictures: vae.encode(pictures).latent_dist.sample(), seed, steps * batch_size
        )
        std, mean = torch.std_mean(latents, dim=(0, 2, 3))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=1.0)
    vae.save_pretrained(out)


def vq_autoencoder(
    out: Path, console: Console, *, steps: int = 400, seed: int = 0, channels: int = 8, codes: int = 256, lr: float = 2e-3,
    batch_size: int = 16,
) -> None:  # fmt: skip
    """Train a small ``VQModel``; its code vectors, as often as they are used, have mean 0 and deviation 1.

    The first quarter of the steps goes without quantising; then the code book is laid on latents, and until three quarters
    of the steps vectors that are not used are laid on others.

    Args:
        out: folder.
        console: progress.
        steps, seed, lr, batch_size: see :func:`kl_autoencoder`.
        channels: of a code vector.
        codes: how many there are.
    """
    from diffusers import VQModel  # type: ignore[attr-defined]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vq: Any = VQModel(**_shape(channels), num_vq_embeddings=codes, sample_size=_PICTURES.size).train()
        plain, used = steps // 4, torch.zeros(codes, dtype=torch.bool)

        def loss(pictures: Tensor, weight: Tensor, step: int) -> Tensor:
            latents = vq.encode(pictures).latents
            if step < plain:
                return distance(decode(vq, latents), pictures, weight)
            if step == plain:
                _lay(vq, latents, torch.zeros_like(used))
            elif (step - plain) % REVIVED == 0 and step <= 3 * steps // 4:
                _lay(vq, latents, used)
                used.zero_()
            quantised, nearness, (_, _, chosen) = vq.quantize(latents)
            used[chosen] = True
            return distance(decode(vq, quantised), pictures, weight) + nearness

        _fit(vq.parameters(), loss, seed, steps, batch_size, lr, console)
        vq.eval()
        standardise(
            vq,
            _held_out(lambda pictures: vq.quantize(vq.encode(pictures).latents)[0], seed, steps * batch_size),
        )
    vq.save_pretrained(out)


def decode(vq: Any, latents: Tensor) -> Tensor:
    """Code vectors or latents (B, C, h, w) -> pictures (B, 3, H, W), by the parts of ``VQModel.decode`` that do not quantise."""
    return vq.decoder(vq.post_quant_conv(latents), None)


@torch.no_grad()
def standardise(vq: Any, vectors: Tensor) -> None:
    """Give code vectors mean 0 in each channel and deviation 1 over all, without a change of what the model does.

    One deviation for all channels, or another code would be the nearest. What is taken off here is put back by the
    convolution behind it.

    Args:
        vq: a ``VQModel``.
        vectors: (n, C, h, w) as it quantised pictures.
    """
    mean = vectors.mean(dim=(0, 2, 3))
    std = (vectors - mean[:, None, None]).std()
    before, behind = vq.quant_conv, vq.post_quant_conv
    before.weight.div_(std)
    before.bias.sub_(mean).div_(std)
    vq.quantize.embedding.weight.sub_(mean).div_(std)
    behind.bias.add_(behind.weight.flatten(1) @ mean)
    behind.weight.mul_(std)


@torch.no_grad()
def _lay(vq: Any, latents: Tensor, kept: Tensor) -> None:
    """Lay all code vectors but those kept, (codes,) bool, on latents (B, C, h, w) that are drawn of these."""
    flat = latents.movedim(1, -1).flatten(0, -2)
    drawn = flat[torch.randperm(len(flat))[: len(kept)]]
    book = vq.quantize.embedding.weight
    book.copy_(torch.where(kept[:, None], book, drawn))


def _fit(
    parameters: Iterable[nn.Parameter], loss_of: Callable[[Tensor, Tensor, int], Tensor], seed: int, steps: int,
    batch_size: int, lr: float, console: Console,
) -> None:  # fmt: skip
    """``loss_of``: (pictures in [-1, 1], weights of their pixels, step) -> a scalar."""

    def loss_at(step: int) -> Tensor:
        pictures, objects = _batch(_PICTURES, SCENE_SEED + seed, step * batch_size, batch_size)
        return loss_of(pictures, 1 + OBJECTS * objects, step)

    fit([group(parameters, lr)], loss_at, steps, console, betas=(0.9, 0.99))


@torch.no_grad()
def _held_out(encode: Callable[[Tensor], Tensor], seed: int, first: int) -> Tensor:
    """(MEASURED, C, h, w) of scenes that no step saw."""
    starts = range(first, first + MEASURED, 64)
    return torch.cat([encode(_batch(_PICTURES, SCENE_SEED + seed, start, 64)[0]) for start in starts])


def _shape(channels: int) -> dict[str, Any]:
    """Arguments of both: three resolutions, so a latent stands for 4 x 4 pixels."""
    widths = (16, 32, 64)
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "latent_channels": channels,
        "norm_num_groups": 8,
    }


KINDS: dict[str, Callable[..., None]] = {"kl_autoencoder": kl_autoencoder, "vq_autoencoder": vq_autoencoder}
"""Name in ``parts.NAME.kind`` -> what trains it."""
