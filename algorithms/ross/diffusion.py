"""What the head is asked: objectives over a noise schedule (Ho et al. 2020; the paper's Section 3 and Figure 3).

Denoising objectives give the head a noisy target and a time and ask for one of the quantities that determine the
clean one; regression objectives give it nothing and ask for the target itself. All have one interface
(:class:`Objective`), so that target and objective are chosen apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ...models.errors import UserError, nearest

TIMESTEPS = 1000
"""T of the paper's code."""


def cosine_alpha_bar(timesteps: int = TIMESTEPS) -> torch.Tensor:
    """Signal's share of the variance after t + 1 steps, (T,) float64 (improved DDPM's cosine, Nichol & Dhariwal 2021).

    beta_t = min(1 - f((t + 1) / T) / f(t / T), 0.999) with f(u) = cos^2((u + 0.008) / 1.008 * pi / 2).
    """

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((t + 1) / timesteps) / f(t / timesteps), 0.999) for t in range(timesteps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


def ignoring_the_condition(timesteps: int = TIMESTEPS) -> float:
    """Least epsilon loss that any head reaches on white targets without its condition: the mean of alpha-bar (.496).

    For z0 ~ N(0, 1) the best guess of the noise in z_t is sqrt(1 - a) z_t, which is wrong by a (= alpha-bar) on
    average. A loss below this number alone proves nothing about targets that are not white.
    """
    return float(cosine_alpha_bar(timesteps).mean())


LARGEST_TOKEN = 5.0
"""Bound of a sampled target's channels: targets are about standardised."""


@dataclass(frozen=True)
class Objective:
    """One way of asking for the target.

    Attributes:
        name: as in a YAML.
        noisy: the head gets (z_t, t); else it regresses the target from the condition alone.
        decoded: the head's output is compared after the target's frozen decoder, as pixels.
        mix: (z0, noise, share) -> (what the head sees, what it should say); ``share`` broadcasts and is
            alpha-bar, or sigma for ``flow_matching``.
        distance: (said, wanted) -> per token, the last axis reduced.
        shares: T -> (T,) float64 table of ``share``.
        prediction_type: as diffusers' schedulers call it; None: nothing to sample.
    """

    name: str
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    noisy: bool = False
    decoded: bool = False
    mix: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    shares: Callable[[int], torch.Tensor] = cosine_alpha_bar
    prediction_type: str | None = None

    def scheduler(self, timesteps: int) -> Any:
        """A diffusers scheduler that samples what this objective learnt.

        DDIM (deterministic, few steps) for the diffusion objectives, Euler for flow matching. The head is told
        :meth:`head_time` of its timesteps.
        """
        if self.prediction_type is None:
            raise UserError(f"objective '{self.name}' regresses the target: there is nothing to sample")
        if self.prediction_type == "flow":
            from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
                FlowMatchEulerDiscreteScheduler,
            )

            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=timesteps)
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        prediction: Any = self.prediction_type
        kept = self.shares(timesteps)
        betas = 1 - kept / torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
        return DDIMScheduler(
            num_train_timesteps=timesteps,
            trained_betas=betas.tolist(),
            prediction_type=prediction,
            # At the noisiest times the guess of the clean target is a small difference divided by sqrt(alpha-bar),
            # 5e-5 at the last one: errors of the head would be thrown far out of what targets are.
            clip_sample=True,
            clip_sample_range=LARGEST_TOKEN,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
        )

    def head_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """Time that the head is told, an index into ``shares``, at a timestep of :meth:`scheduler`.

        The flow-matching scheduler counts 1 .. T (with fractions), the others 0 .. T - 1.
        """
        if self.prediction_type == "flow":
            timestep = (timestep.float() - 1).round().clamp(min=0)
        return timestep.long()


def _epsilon(z0: torch.Tensor, noise: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return kept.sqrt() * z0 + (1 - kept).sqrt() * noise, noise


def _sample(z0: torch.Tensor, noise: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return kept.sqrt() * z0 + (1 - kept).sqrt() * noise, z0


def _velocity(z0: torch.Tensor, noise: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = kept.sqrt(), (1 - kept).sqrt()
    return a * z0 + b * noise, a * noise - b * z0


def _flow(z0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (1 - sigma) * z0 + sigma * noise, noise - z0


def _sigmas(timesteps: int) -> torch.Tensor:
    """Noise share of flow matching, (t + 1) / T: as diffusers' scheduler numbers it."""
    return torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps


def squared(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the channels."""
    return (said - wanted).square().mean(-1)


def cosine(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity over the channels (0 .. 2): the paper's distance for latent regression (Figure 3 b)."""
    return 1 - F.cosine_similarity(said, wanted, dim=-1)


def smooth_l1(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Huber's distance with a knee at 1, mean over the channels."""
    return F.smooth_l1_loss(said, wanted, reduction="none").mean(-1)


OBJECTIVES = {
    o.name: o
    for o in (
        Objective("epsilon", squared, noisy=True, mix=_epsilon, prediction_type="epsilon"),
        Objective("sample", squared, noisy=True, mix=_sample, prediction_type="sample"),
        Objective("v_prediction", squared, noisy=True, mix=_velocity, prediction_type="v_prediction"),
        Objective("flow_matching", squared, noisy=True, mix=_flow, shares=_sigmas, prediction_type="flow"),
        Objective("mse", squared),
        Objective("cosine", cosine),
        Objective("smooth_l1", smooth_l1),
        Objective("decoded_mse", squared, decoded=True),
    )
}
"""Names in a YAML. ``epsilon`` is the paper's; diffusers' names where it has them; ``decoded_mse``: latent to pixel."""


def objective_named(name: str, where: str = "algorithms.ross.objective") -> Objective:
    """The objective called ``name``.

    Raises:
        UserError: there is none; the line names the nearest one.
    """
    if name not in OBJECTIVES:
        raise UserError(f"{where}: unknown objective '{name}'{nearest(str(name), OBJECTIVES)}")
    return OBJECTIVES[name]
