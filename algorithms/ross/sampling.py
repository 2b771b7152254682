"""From visual outputs back to pictures: sampling by diffusers' schedulers, and strips to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ...models.step import Step
from ...models.vlm import VisionLanguageModel
from .diffusion import Objective
from .functional import starting_noise
from .ross import ROSS
from .views import Views

GAP, LABEL = 4, 16
"""Pixels between pictures of a strip; height of its column titles."""


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


def strip(columns: Mapping[str, Sequence[torch.Tensor]], side: int = 128) -> Image.Image:
    """One row a view, one titled column a kind of picture.

    Args:
        columns: title -> pictures (3, h, w) in [0, 1], as many in each.
        side: pixels of the longer side as shown.
    """
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    heights = [max(round(side * p.shape[1] / max(p.shape[1:])) for p in row) for row in rows]
    sheet = Image.new(
        "RGB",
        (len(columns) * (side + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1) + LABEL),
        (250, 250, 248),
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for c, title in enumerate(columns):
        draw.text((GAP + c * (side + GAP), 2), title, fill=(40, 40, 40), font=font)
    top = LABEL + GAP
    for row, height in zip(rows, heights, strict=True):
        for c, picture in enumerate(row):
            scale = side / max(picture.shape[1:])
            shown = Image.fromarray(as_array(picture)).resize(
                (round(picture.shape[2] * scale), round(picture.shape[1] * scale)), Image.Resampling.NEAREST
            )
            sheet.paste(shown, (GAP + c * (side + GAP), top))
        top += height + GAP
    return sheet


def as_array(picture: torch.Tensor) -> np.ndarray:
    """(3, h, w) in [0, 1] -> (h, w, 3) uint8."""
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
