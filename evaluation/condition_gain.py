"""Does ROSS's head read the picture off the language model? Its loss with the right condition and with wrong ones.

At fixed times and fixed noise, on held-out pictures, the loss is measured with the hidden states of the picture
itself, of another picture, and with zeros. The difference between another's and its own is the **condition gain**:
what the head gets from the language model about *this* picture. A low loss alone says little: a denoiser that ignores
its condition reaches alpha-bar on white targets (.496 on average), and less on targets that are not white.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..algorithms.ross.functional import Draws, draw_noise, token_losses
from ..algorithms.ross.ross import ROSS
from ..algorithms.ross.sampling import conditions
from ..algorithms.ross.views import Views
from ..models.errors import UserError
from ..models.vlm import VisionLanguageModel
from .intervals import mean_and_half

CONDITIONS = ("right", "another", "zero")
SEED = 0
"""Noise depends on this and the sample alone: two runs are compared on the same noise."""


@dataclass(frozen=True)
class ConditionCurve:
    """Losses of n views at T times.

    Attributes:
        times: (T,) int, ``[0]`` for objectives without noise.
        loss: condition -> (n, T) float64.
        ignoring: (T,) least loss of a head that ignores its condition, on white targets; None where there is no
            such number (objectives other than ``epsilon``).
    """

    times: np.ndarray
    loss: dict[str, np.ndarray]
    ignoring: np.ndarray | None

    def gains(self) -> np.ndarray:
        """Condition gain of each view, mean over times: (n,)."""
        return (self.loss["another"] - self.loss["right"]).mean(1)

    def gain(self) -> tuple[float, float]:
        """Condition gain, and half of its 95 % interval over views."""
        return mean_and_half(self.gains())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        gain, half = self.gain()
        return {
            "views": len(self.loss["right"]),
            "times": self.times.tolist(),
            "loss": {name: values.mean(0).tolist() for name, values in self.loss.items()},
            "mean": {name: float(values.mean()) for name, values in self.loss.items()},
            "ignoring_white": None if self.ignoring is None else self.ignoring.tolist(),
            "condition_gain": gain,
            "condition_gain_95": half,
        }


@torch.no_grad()
def condition_curve(
    model: VisionLanguageModel, ross: ROSS, batches: Iterable[dict[str, Any]], times: Sequence[int]
) -> ConditionCurve:
    """Measure on micro-batches of pictures that all differ.

    Args:
        model: in evaluation mode, with the trained head (``ROSS.restore``).
        ross: as it was trained.
        batches: micro-batches on the model's device; every picture once, several of each grid.
        times: at which the loss is measured.

    Raises:
        UserError: no two pictures share a grid, so there is no other picture's condition to be had.
    """
    head = model.net.auxiliary[ross.name]
    objective, target = ross.objective, ross.built_target
    if objective.decoded:
        raise UserError("condition gain: decoded_mse compares pictures, there are no latents to compare")
    at = torch.tensor(list(times) if objective.noisy else [0])
    shares = objective.shares(ross.timesteps)
    found: dict[str, list[np.ndarray]] = {name: [] for name in CONDITIONS}
    for batch in batches:
        with model.net.autocast():
            right = conditions(model, ross, batch)
        device = right.device
        grids = batch["grids"]
        views, key = Views.of(grids, device), ross.keys(batch, SEED)
        wanted = ross.targets(model, batch, views, key)
        noise = draw_noise(key, views, len(at), target.dim, ross.timesteps).noise
        draws = Draws(at.to(device)[:, None].expand(-1, len(grids)), noise)
        source, used = others(grids)
        given = {"right": right, "another": right[source.to(device)], "zero": torch.zeros_like(right)}
        for name, condition in given.items():
            losses = token_losses(head, condition, wanted, views, objective, draws, shares.float().to(device))
            of_views = torch.zeros(len(losses), len(grids), dtype=torch.float64, device=device)
            of_views.index_add_(1, views.view, losses.double())
            patches = torch.tensor([r * c for r, c in grids], device=device)
            found[name].append((of_views / patches).T.cpu().numpy()[used])
    if not any(len(part) for part in found["right"]):
        raise UserError("condition gain: no two pictures share a grid; give more pictures")
    ignoring = shares[at].numpy() if objective.name == "epsilon" else None
    return ConditionCurve(at.numpy(), {n: np.concatenate(v) for n, v in found.items()}, ignoring)


def others(grids: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, np.ndarray]:
    """For each patch the same patch of the next view with the same grid; and which views have such a one, (V,)."""
    sizes = [r * c for r, c in grids]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    following = np.arange(len(grids))
    for grid in set(grids):
        members = [i for i, g in enumerate(grids) if g == grid]
        following[members] = np.roll(members, -1)
    source = [torch.arange(int(starts[j]), int(starts[j + 1])) for j in following]
    return torch.cat(source), following != np.arange(len(grids))
