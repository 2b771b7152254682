"""ROSS's objectives: the true answer costs nothing, silence costs the variance, samplers find the target again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from opsin.algorithms.ross.diffusion import OBJECTIVES, Objective, objective_named
from opsin.algorithms.ross.functional import (
    Draws,
    decoded_loss,
    draw_noise,
    posterior_noise,
    reconstruction_loss,
    starting_noise,
)
from opsin.algorithms.ross.heads import make_head
from opsin.algorithms.ross.sampling import sample_tokens
from opsin.algorithms.ross.targets import make_target
from opsin.algorithms.ross.targets.pixels import PixelTarget
from opsin.algorithms.ross.views import Views
from opsin.models.errors import UserError
from opsin.models.randomness import view_keys

from methods import loud

NOISY = [o for o in OBJECTIVES.values() if o.noisy]
PLAIN = [o for o in OBJECTIVES.values() if not o.noisy and not o.decoded]
GRIDS = [(4, 4), (2, 3), (4, 4), (1, 7), (3, 5)]
P = 60


def noise(views: Views, count: int, dim: int = 8) -> Draws:
    zero = torch.zeros(count, dtype=torch.int64)
    return draw_noise(view_keys(1, torch.arange(count), zero, zero, zero), views, 4, dim, 1000)


class Oracle(nn.Module):
    """Knows the target and says what it is asked for; derived from z_t, not from the noise."""

    def __init__(self, objective: Objective, z0: torch.Tensor):
        super().__init__()
        self.kind, self.z0, self.share = objective.prediction_type, z0, objective.shares(1000)

    def forward(self, condition: Any, views: Views, noisy: Any, time: Any) -> torch.Tensor:
        if self.kind in (None, "sample"):
            return self.z0[None] if noisy is None else self.z0.expand_as(noisy)
        share = self.share[time][:, views.view, None]
        if self.kind == "flow":
            return ((noisy - self.z0) / share).float()
        if self.kind == "epsilon":
            return ((noisy - share.sqrt() * self.z0) / (1 - share).sqrt()).float()
        return ((share.sqrt() * noisy - self.z0) / (1 - share).sqrt()).float()


class Silent(nn.Module):
    def forward(self, condition: Any, views: Views, noisy: Any, time: Any) -> torch.Tensor:
        return torch.zeros_like(noisy)


@pytest.mark.parametrize("objective", [*NOISY, *PLAIN], ids=lambda o: o.name)
def test_the_true_answer_has_loss_zero_and_another_has_not(objective: Objective) -> None:
    views, z0 = Views.of(GRIDS), torch.randn(P, 8)
    draws = noise(views, len(GRIDS)) if objective.noisy else None
    shares = objective.shares(1000).float()
    for wrong in (0.0, 0.5):
        head = Oracle(objective, z0 + wrong * torch.randn_like(z0))
        loss = reconstruction_loss(head, torch.zeros(P, 4), z0, views, objective, draws, shares)
        assert loss.shape == (P,)
        assert float(loss.max()) < 1e-6 if not wrong else float(loss.min()) > 1e-4


@pytest.mark.parametrize(("name", "value"), [("epsilon", 1.0), ("sample", 1.0), ("v_prediction", 1.0), ("flow_matching", 2.0)])  # fmt: skip
def test_silence_costs_the_variance_of_what_is_asked(name: str, value: float) -> None:
    views, objective = Views.of([(16, 16)] * 8), OBJECTIVES[name]
    draws, shares = noise(views, 8, dim=16), objective.shares(1000).float()
    loss = reconstruction_loss(Silent(), torch.zeros(2048, 1), torch.randn(2048, 16), views, objective, draws, shares)  # fmt: skip
    assert float(loss.mean()) == pytest.approx(value, abs=0.02)


def test_the_exact_latents_decode_to_loss_zero_and_hidden_ones_reach_no_neighbour() -> None:
    target, pictures = PixelTarget(cell=4), [torch.rand(3, 16, 16), torch.rand(3, 8, 12)]
    grids, views = [(4, 4), (2, 3)], Views.of([(4, 4), (2, 3)])
    z0 = target.moments(pictures, grids)
    exact = Oracle(OBJECTIVES["decoded_mse"], z0)
    assert float(decoded_loss(exact, z0, pictures, grids, views, target).max()) < 1e-10

    class Blurred(PixelTarget):
        def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
            return F.avg_pool2d(super().decode(tokens, grid), 5, 1, 2)

    visible = torch.rand(22) > 0.4
    seen = Views.of(grids, visible=visible)
    results = []
    for shift in (0.0, 0.3):
        condition = (z0 + shift * ~visible[:, None]).requires_grad_()
        head = make_head("mlp", 48, 48, depth=1)
        loss = decoded_loss(loud(head), condition, pictures, grids, seen, Blurred(4))[visible].sum()
        results.append((loss.detach(), torch.autograd.grad(loss, condition)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert bool((results[0][1][~visible] == 0).all()) and bool((results[0][1][visible] != 0).any())


@pytest.mark.parametrize("steps", [50, 30, 1000])
@pytest.mark.parametrize("objective", NOISY, ids=lambda o: o.name)
def test_a_sampler_with_an_oracle_recovers_the_target(objective: Objective, steps: int) -> None:
    views, z0 = Views.of([(3, 3)]), torch.randn(9, 8)
    scheduler, head = objective.scheduler(1000), Oracle(objective, z0)
    if objective.prediction_type != "flow":
        assert torch.allclose(scheduler.alphas_cumprod.double(), objective.shares(1000), atol=1e-6)
    scheduler.set_timesteps(steps)
    x, told = torch.randn(1, 9, 8), []
    for timestep in scheduler.timesteps:
        time = objective.head_time(timestep).view(1, 1)
        told.append(int(time))
        x = scheduler.step(head(None, views, x, time), timestep, x).prev_sample
    assert told[0] == 999 and told == sorted(told, reverse=True) and 0 <= told[-1] < 1000 / steps + 1
    assert float((x[0] - z0).abs().max()) < 2e-2
    if objective.prediction_type == "flow":  # the noise share that the head was trained with at this time
        sigmas = objective.shares(1000)[torch.tensor(told)]
        assert torch.allclose(sigmas.float(), scheduler.sigmas[:-1], atol=0.51e-3)


def test_regressions_have_nothing_to_sample_and_unknown_objectives_name_the_nearest() -> None:
    with pytest.raises(UserError, match="'mse' regresses the target: there is nothing to sample"):
        OBJECTIVES["mse"].scheduler(1000)
    with pytest.raises(UserError, match="unknown objective 'epsiln'; did you mean 'epsilon'"):
        objective_named("epsiln")


@pytest.mark.parametrize("name", ["pixels", "autoencoder"])
def test_a_decoder_pulls_back_what_lies_outside_the_colours(name: str) -> None:
    """Latent to pixel: a clamp inside ``decode`` would leave dead gradients there."""
    target = make_target(name)
    tokens = torch.full((1, 4, target.dim), 8.0, requires_grad=True)
    pictures = target.decode(tokens, (2, 2))
    assert float(pictures.max()) > 1
    pictures.square().sum().backward()
    assert tokens.grad is not None and bool((tokens.grad != 0).any(-1).all())


def test_more_steps_than_times_are_as_many_as_there_are() -> None:
    views, head = Views.of([(2, 2)]), make_head("dit", 8, 4, width=64)
    given = (head, torch.randn(4, 8), views, OBJECTIVES["epsilon"], torch.randn(4, 4))
    few, many = (sample_tokens(*given, timesteps=20, steps=steps) for steps in (20, 50))
    assert torch.equal(few, many)


@pytest.mark.parametrize("device", ["meta"])
def test_noise_never_passes_through_the_host(device: str) -> None:
    views = Views.of([(2, 3), (4, 4)], torch.device(device))
    uid = torch.ones(2, dtype=torch.int64, device=device)
    key = view_keys(3, uid, uid, uid, uid)
    drawn = draw_noise(key, views, 2, 5, 1000)
    assert drawn.time.shape == (2, 2) and drawn.noise.shape == (2, 22, 5)
    for noise in (posterior_noise(key, views, 5), starting_noise(key, views, 5), drawn.noise[0]):
        assert noise.device.type == device and noise.shape == (22, 5)
