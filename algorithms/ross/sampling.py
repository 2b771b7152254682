"""From visual outputs back to pictures: sampling by diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...models.step import Step
from ...models.vlm import VisionLanguageModel
from .diffusion import Objective
from .functional import starting_noise
from .ross import ROSS
from .views import Views


@torch.no_grad()
def conditions(model: VisionLanguageModel, ross: ROSS, batch: dict[str, Any]) -> torch.Tensor:
    """Hidden states at the patches of a micro-batch, (P, D): what ROSS reconstructs from."""
    step = Step(batch, taps={ross.layer})
    outputs = model.net(batch, step)
    step.tapped.update({n: outputs[f"tap{n}"] for n in step.taps if f"tap{n}" in outputs})
    return step.tapped[ross.layer].flatten(0, 1)[batch["patch_position"]]


@torch.no_grad()
def sample_tokens(
    head: nn.Module,
    condition: torch.Tensor,
    views: Views,
    objective: Objective,
    noise: torch.Tensor,
    *,
    timesteps: int,
    steps: int = 50,
) -> torch.Tensor:
    """Reconstructed target tokens, (P, C).

    Args:
        head: trained for ``objective``.
        condition: (P, D).
        noise: (P, C), where sampling starts; unused by objectives that regress.
        timesteps: T of training.
        steps: evaluations of the head, at most T.
    """
    if not objective.noisy:
        return head(condition, views, None, None)[0]
    scheduler = objective.scheduler(timesteps)
    scheduler.set_timesteps(min(steps, timesteps), device=noise.device)
    count = int(views.view[-1]) + 1
    tokens = noise
    for t in scheduler.timesteps:
        said = head(condition, views, tokens[None], objective.head_time(t).expand(1, count))[0]
        tokens = scheduler.step(said, t, tokens, return_dict=False)[0]
    return tokens


def reconstruct(
    model: VisionLanguageModel,
    ross: ROSS,
    batch: dict[str, Any],
    condition: torch.Tensor,
    steps: int = 50,
) -> list[torch.Tensor]:
    """A picture (3, h, w) in [0, 1] of each view of a micro-batch, from a condition (P, D) and fixed noise."""
    views = Views.of(batch["grids"], condition.device)
    key = ross.keys(batch)
    tokens = sample_tokens(
        model.net.auxiliary[ross.name],
        condition,
        views,
        ross.objective,
        starting_noise(key, views, ross.built_target.dim),
        timesteps=ross.timesteps,
        steps=steps,
    )
    return decoded(ross, tokens, batch["grids"])


@torch.no_grad()
def decoded(ross: ROSS, tokens: torch.Tensor, grids: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Target tokens (P, C) as one picture a view."""
    parts = tokens.split([r * c for r, c in grids])
    target = ross.placed_target(tokens.device)
    shown = (target.decode(part[None], grid)[0] for part, grid in zip(parts, grids, strict=True))
    return [picture.clamp(0, 1) for picture in shown]


@torch.no_grad()
def targets_shown(model: VisionLanguageModel, ross: ROSS, batch: dict[str, Any]) -> list[torch.Tensor]:
    """What the target itself keeps of each view: the best that a reconstruction can look like."""
    views = Views.of(batch["grids"], batch["patch_position"].device)
    target = ross.placed_target(views.view.device)
    moments = target.moments(model.pictures(batch), batch["grids"])
    noise = torch.zeros(len(views.view), target.dim, device=moments.device) if target.draws else None
    return decoded(ross, target.draw(moments, noise), batch["grids"])
