"""ROSS as functions on tensors: noise, loss of each view, and nothing of Composer (arXiv 2410.09575).

V views (a view is one grid of patches), P patches in all, K draws of noise a view, C channels of a target token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...models.randomness import keys, normal, uniform
from ...models.targets.base import Target, alike, fold
from .diffusion import Objective
from .views import Views

_POSTERIOR, _TIME, _NOISE, _START = 0, 1, 2, 3
"""Streams of random numbers of one view."""


@dataclass(frozen=True)
class Draws:
    """Noise of a micro-batch.

    Attributes:
        time: (K, V) int64, 0 .. T - 1, one for all patches of a view.
        noise: (K, P, C) float32, standard normal.
    """

    time: torch.Tensor
    noise: torch.Tensor


def draw_noise(key: torch.Tensor, views: Views, draws: int, dim: int, timesteps: int) -> Draws:
    """Times and noise of K draws; see :class:`Draws`. ``key``: (V,), of ``models.randomness.view_keys``."""
    draw = torch.arange(draws, device=key.device)[:, None]
    time = (uniform(keys(key, _TIME, draw))[..., 0] * timesteps).long().clamp(max=timesteps - 1)
    return Draws(time, _patch_noise(keys(key, _NOISE, draw), views, dim))


def posterior_noise(key: torch.Tensor, views: Views, dim: int) -> torch.Tensor:
    """Noise that draws a target from its posterior, shared by all K draws: (P, C)."""
    return _patch_noise(keys(key, _POSTERIOR)[None], views, dim)[0]


def starting_noise(key: torch.Tensor, views: Views, dim: int) -> torch.Tensor:
    """Noise from which reconstructions are sampled: (P, C)."""
    return _patch_noise(keys(key, _START)[None], views, dim)[0]


def _patch_noise(key: torch.Tensor, views: Views, dim: int) -> torch.Tensor:
    """(K, V) keys -> (K, P, C): counted within each view, so neighbours in the batch change nothing."""
    place = views.row * views.extent[:, 1] + views.column
    counter = place[:, None] * dim + torch.arange(dim, device=key.device)
    return normal(key[:, views.view, None], counter)


def token_losses(
    head: nn.Module,
    condition: torch.Tensor,
    target: torch.Tensor,
    views: Views,
    objective: Objective,
    draws: Draws | None,
    shares: torch.Tensor | None,
) -> torch.Tensor:
    """Loss of each patch and draw, mean over channels: (K, P) float32; K = 1 for objectives without noise.

    Args:
        head: see ``heads``.
        condition: (P, D) hidden states at the image tokens.
        target: (P, C) float32.
        views: where the patches lie.
        objective: what the head is asked (not a ``decoded`` one).
        draws: for noisy objectives.
        shares: (T,) float32 table of the objective.
    """
    if not objective.noisy:
        return objective.distance(head(condition, views, None, None), target[None])
    assert draws is not None and shares is not None and objective.mix is not None
    share = shares[draws.time][:, views.view, None]
    noisy, wanted = objective.mix(target, draws.noise, share)
    return objective.distance(head(condition, views, noisy, draws.time), wanted)


def reconstruction_loss(
    head: nn.Module,
    condition: torch.Tensor,
    target: torch.Tensor,
    views: Views,
    objective: Objective,
    draws: Draws | None,
    shares: torch.Tensor | None,
) -> torch.Tensor:
    """Loss of each patch, mean over channels and draws: (P,) float32; arguments as :func:`token_losses`."""
    return token_losses(head, condition, target, views, objective, draws, shares).mean(0)


def decoded_loss(
    head: nn.Module,
    condition: torch.Tensor,
    pictures: Sequence[torch.Tensor],
    grids: Sequence[tuple[int, int]],
    views: Views,
    target: Target,
) -> torch.Tensor:
    """Latent to pixel (ROSS-R): the head's latents through the target's frozen decoder against the picture, (P,).

    Squared error of RGB in [-1, 1], mean over the pixels of a patch's cell. The decoder gets zeros for patches that
    are not visible: it mixes neighbours, and nothing may be learnt there.
    """
    said = head(condition, views, None, None)[0]
    if views.visible is not None:
        said = torch.where(views.visible[:, None], said, 0.0)
    parts = said.split([rows * columns for rows, columns in grids])
    errors: dict[int, torch.Tensor] = {}
    with torch.autocast(said.device.type, enabled=False):  # the decoder keeps its own precision
        for grid, members in alike(pictures, grids):
            wanted = target.sized(torch.stack([pictures[i] for i in members]), *grid)
            shown = target.decode(torch.stack([parts[i] for i in members]).float(), grid)
            error = fold((2 * (shown - wanted)).square(), target.cell).mean(-1)
            errors.update(zip(members, error.unbind(), strict=True))
    return torch.cat([errors[i] for i in range(len(grids))])


def mean_of_views(
    loss: torch.Tensor, views: Views, count: int, counted: torch.Tensor | None, used: torch.Tensor
) -> torch.Tensor:
    """Sum over the used views of the mean over their counted patches: a scalar.

    Args:
        loss: (P,).
        count: V.
        counted: (P,) bool, patches in the loss; None: all.
        used: (V,) bool.
    """
    weight = torch.ones_like(loss) if counted is None else counted.to(loss.dtype)
    patches = torch.zeros(count, dtype=loss.dtype, device=loss.device).index_add(0, views.view, weight)
    weight = weight * used.to(loss.dtype)[views.view] / patches.clamp(min=1)[views.view]
    return torch.where(weight > 0, loss * weight, 0.0).sum()
