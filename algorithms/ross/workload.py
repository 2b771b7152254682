"""What ROSS adds to a step: its head for all draws, and the target where it is not stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ...models.vlm import VisionLanguageModel
from ..workload import Grids, Workload
from .functional import Draws, reconstruction_loss
from .heads import make_head
from .ross import ROSS
from .views import Views


def workload(algorithm: ROSS, model: VisionLanguageModel) -> Workload:
    """After INIT; see :class:`Workload`. ``decoded_mse`` is counted without the target's decoder."""
    dim = algorithm.built_target.dim
    make = partial(
        make_head,
        algorithm.head,
        model.hf.config.get_text_config().hidden_size,
        dim,
        depth=algorithm.depth,
        width=algorithm.width,
        mlp_ratio=algorithm.mlp_ratio,
        position_grid=algorithm.position_grid,
    )
    return Workload(make, partial(_loss, algorithm, dim), algorithm.built_target)


def _loss(algorithm: ROSS, dim: int, grids: Grids) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    objective, draws = algorithm.objective, algorithm.draws
    for device in ("cpu", "meta"):  # laid out by values, which tensors without data do not have
        Views.of(grids, torch.device(device))

    def loss(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if algorithm.detach:
            hidden = hidden.detach()
        device = hidden.device
        views = Views.of(grids, device)
        if objective.decoded:
            return head(hidden, views, None, None).square().sum()
        noise = None
        if objective.noisy:
            time = torch.zeros(draws, len(grids), dtype=torch.int64, device=device)
            noise = Draws(time, torch.empty(draws, len(hidden), dim, device=device))
        shares = torch.empty(algorithm.timesteps, device=device)
        target = torch.empty(len(hidden), dim, device=device)
        return reconstruction_loss(head, hidden, target, views, objective, noise, shares).sum()

    return loss
