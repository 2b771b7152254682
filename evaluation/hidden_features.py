"""How well does a model predict what was hidden from it? JARVIS's predictions against what cheaper guesses reach.

Features of a vision model share a large mean, so that a plain cosine is high for anybody who predicts that mean.
Everything here is **centred**: the mean of the training pictures' features at the same place of the grid is taken away
from prediction and target before the cosine is taken. The mean itself scores 0 by construction, and so does whoever knows
the place and not the picture. Where pictures differ in their whole (the colour of a wall), that difference is most of what
is left, and any visible patch tells it; ``within`` is the cosine after the mean over the picture's own hidden patches is
taken away as well, from both: what is said about one patch rather than another. There, ``another`` is the mark to beat:
places where most pictures show nothing deviate from their mean in one direction, which needs no picture to be told.

Rows, all on the same hidden positions of held-out pictures:

* ``jarvis``: the trained head;
* ``mean``: the mean at that place;
* ``nearest``: the target feature of the nearest context patch (which no model input holds);
* ``linear_context``: ridge regression from the visual tokens of the context (their mean, the nearest one, where it lies);
* ``linear_token``: ridge regression from the visual token *of the hidden place itself*, as the projector made it from the
  whole picture: what its context leaks is at most this, and a model that saw the picture would start from it;
* ``another``: JARVIS's predictions against another picture's features: what ignores the picture scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ..algorithms.jarvis.functional import compared
from ..algorithms.jarvis.jarvis import JARVIS
from ..algorithms.jarvis.sampler import BLOCKS, CONTEXT
from ..data.batch import split_batch, to_device
from ..models.errors import UserError
from ..models.vlm import VisionLanguageModel
from .intervals import mean_and_half

ROWS = ("jarvis", "mean", "nearest", "linear_context", "linear_token", "another")
SEED = 0
"""Of the masks: runs with the same keywords of masks are compared on the same hidden positions."""
RIDGE = 1e-3
"""Strength of the ridge, in units of the inputs' mean variance."""


@dataclass
class Seen:
    """What a model makes of some pictures with one mask each, all on one grid of V patches. N pictures.

    Attributes:
        token: (N, V, D) visual tokens of the whole picture, before anything is hidden.
        feature: (N, V, C) target features as the loss compares them.
        predicted: (N, V, C) predictions where ``hidden``, else zeros; None when not asked for.
        hidden, context: (N, V) bool.
    """

    token: torch.Tensor
    feature: torch.Tensor
    predicted: torch.Tensor | None
    hidden: torch.Tensor
    context: torch.Tensor


@torch.no_grad()
def look(
    model: VisionLanguageModel, jarvis: JARVIS, device_batch: dict[str, Any], predict: bool, step: int = 0
) -> Seen:
    """Mask every view of a device batch (on the CPU), and run the model on it; ``step`` as in ``JARVIS.enter``.

    Raises:
        UserError: the views have several grids, or some are too small for masks.
    """
    jarvis.enter(device_batch, step, always=True, seed=SEED)
    batch = split_batch(device_batch, None, training=False)[0]
    grids = set(batch["grids"])
    if len(grids) != 1 or len(batch["jarvis/views"]) != len(batch["grids"]):
        raise UserError(
            "hidden features: needs pictures that the model cuts into one and the same grid, large enough for masks; "
            f"got {' and '.join(f'{r}x{c}' for r, c in sorted(grids)) or 'no picture'}"
        )
    rows, columns = grids.pop()
    batch = to_device(batch, next(model.net.hf.parameters()).device)
    shape = (-1, rows * columns)
    code = batch["patch/jarvis"].view(shape)
    record = model.step(batch)
    jarvis.ask(model, batch)
    kept: dict[str, torch.Tensor] = {}
    edit = record.edits.get(jarvis.name, lambda e: e)
    record.edits[jarvis.name] = lambda e: edit(kept.setdefault("embeddings", e))
    with model.net.autocast():
        model(batch)
        predicted = jarvis.predictions(model, batch) if predict else None
    model.end_step()
    feature = compared(jarvis.features(model, batch), jarvis.loss)
    whole = None
    if predicted is not None:
        whole = torch.zeros_like(feature)
        whole[batch["jarvis/targets"]] = (
            compared(predicted, jarvis.loss) if jarvis.loss == "cosine" else predicted.float()
        )
        whole = whole.view(*code.shape, -1)
    token = kept["embeddings"].flatten(0, 1)[batch["patch_position"]].float()
    return Seen(
        token.view(*code.shape, -1),
        feature.view(*code.shape, -1),
        whole,
        (code & BLOCKS) != 0,
        (code & CONTEXT) != 0,
    )


def nearest_context(context: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Index of the nearest context patch of each patch, (N, V) int64; the first in raster order of several."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    at = torch.stack([row, column], -1).reshape(-1, 2).float().to(context.device)
    distance = torch.cdist(at, at).round(decimals=4)[None].expand(len(context), -1, -1)
    return distance.masked_fill(~context[:, None, :], torch.inf).argmin(-1)


def _context_inputs(seen: Seen, grid: tuple[int, int]) -> torch.Tensor:
    """(N, V, 2 D + 2): mean of the context's tokens, the nearest one, and how far it is."""
    nearest = nearest_context(seen.context, grid)
    share = seen.context.float() / seen.context.sum(1, keepdim=True).clamp(min=1)
    mean = torch.einsum("nv,nvd->nd", share, seen.token)[:, None].expand_as(seen.token)
    close = seen.token.gather(1, nearest[..., None].expand_as(seen.token))
    place = torch.arange(seen.context.shape[1], device=nearest.device)
    away = torch.stack([nearest // grid[1] - place // grid[1], nearest % grid[1] - place % grid[1]], -1)
    return torch.cat([mean, close, away.float()], -1)


class Ridge:
    """Linear regression with an intercept of targets around their means by place, fitted on what is added bit by bit.

    The means are known only in the end: they are taken out of the sums then, so that pictures are looked at once.

    Args:
        places: V.
        inputs, outputs: widths.
        device: where the sums are kept, in float64.
    """

    def __init__(self, places: int, inputs: int, outputs: int, device: torch.device | None = None):
        wide = {"dtype": torch.float64, "device": device}
        self.xx = torch.zeros(inputs + 1, inputs + 1, **wide)  # type: ignore[arg-type]
        self.xy = torch.zeros(inputs + 1, outputs, **wide)  # type: ignore[arg-type]
        self.x = torch.zeros(places, inputs + 1, **wide)  # type: ignore[arg-type]
        self.w = torch.zeros(inputs + 1, outputs, **wide)  # type: ignore[arg-type]

    def add(self, x: torch.Tensor, y: torch.Tensor, place: torch.Tensor) -> None:
        """(n, inputs), (n, outputs) and (n,) int64, the place of each."""
        x = F.pad(x.double(), (0, 1), value=1.0)
        self.xx += x.T @ x
        self.xy += x.T @ y.double()
        self.x.index_add_(0, place, x)

    def solve(self, mean: torch.Tensor) -> Ridge:
        """Fit around the means (V, outputs); the intercept is not shrunk."""
        strength = RIDGE * self.xx.diagonal()[:-1].mean()
        shrink = strength * torch.ones_like(self.xx[0])
        shrink[-1] = 0
        target = self.xy - self.x.T @ mean.double()
        # On the CPU, where least squares do without full rank (a width of 0 variance, fewer pictures than inputs).
        solved = torch.linalg.lstsq((self.xx + shrink.diag()).cpu(), target.cpu()).solution
        self.w = solved.to(self.xx.device)
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs) float32."""
        return (F.pad(x.double(), (0, 1), value=1.0) @ self.w).float()


class Guesses:
    """What the training pictures teach the cheap guesses: :meth:`add` for each batch, then :meth:`finish`.

    Attributes:
        grid: rows and columns.
        pictures: how many were added.
        mean: (V, C) of the features at each place.
    """

    def __init__(self, grid: tuple[int, int]):
        self.grid, self.pictures = grid, 0
        self.mean = torch.zeros(0)
        self.total: torch.Tensor | None = None
        self.context: Ridge | None = None
        self.token: Ridge | None = None

    def add(self, seen: Seen) -> None:
        """Some pictures."""
        count, places, width = seen.token.shape
        dim, device = seen.feature.shape[-1], seen.token.device
        if self.context is None or self.token is None or self.total is None:
            self.context, self.token = (Ridge(places, w, dim, device) for w in (2 * width + 2, width))
            self.total = torch.zeros(places, dim, dtype=torch.float64, device=device)
        self.total += seen.feature.double().sum(0)
        self.pictures += count
        hidden = seen.hidden
        place = torch.arange(places, device=device).expand(count, -1)[hidden]
        self.context.add(_context_inputs(seen, self.grid)[hidden], seen.feature[hidden], place)
        self.token.add(seen.token[hidden], seen.feature[hidden], place)

    def finish(self) -> None:
        """Solve the regressions."""
        assert self.context is not None and self.token is not None and self.total is not None
        self.mean = (self.total / self.pictures).float()
        self.context.solve(self.mean)
        self.token.solve(self.mean)


@dataclass(frozen=True)
class HiddenFeatures:
    """Centred cosines: row -> (n,) float64, each picture's mean over its hidden positions; ``within``: see above."""

    cosine: dict[str, np.ndarray]
    within: dict[str, np.ndarray]
    positions: int
    fitted_on: int

    def summary(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Row -> ``cosine`` and ``within`` -> mean over pictures and half of its 95 % interval."""
        return {
            row: {"cosine": mean_and_half(self.cosine[row]), "within": mean_and_half(self.within[row])}
            for row in self.cosine
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = {
            row: {key: {"mean": mean, "half_95": half} for key, (mean, half) in of_row.items()}
            for row, of_row in self.summary().items()
        }
        return {
            "pictures": len(self.cosine["jarvis"]),
            "positions": self.positions,
            "fitted_on": self.fitted_on,
            "rows": rows,
        }


def measure(
    model: VisionLanguageModel,
    jarvis: JARVIS,
    training: Iterable[dict[str, Any]],
    held_out: Iterable[dict[str, Any]],
) -> HiddenFeatures:
    """The table.

    Args:
        model: in evaluation mode, with the trained head (``JARVIS.restore``).
        jarvis: as it was trained.
        training: device batches (CPU) that guesses are fitted on.
        held_out: device batches of other pictures, at least two pictures each.
    """
    guesses: Guesses | None = None
    for step, batch in enumerate(training):
        seen = look(model, jarvis, dict(batch), predict=False, step=step)
        if guesses is None:
            rows, columns = (int(side) for side in batch["view_grid"][0])
            guesses = Guesses((rows, columns))
        guesses.add(seen)
    if guesses is None:
        raise UserError("hidden features: no pictures to fit on")
    guesses.finish()
    cosine: dict[str, list[np.ndarray]] = {row: [] for row in ROWS}
    within: dict[str, list[np.ndarray]] = {row: [] for row in ROWS}
    positions = 0
    for step, batch in enumerate(held_out):
        seen = look(model, jarvis, dict(batch), predict=True, step=step)
        positions += int(seen.hidden.sum())
        for row, (plain, inner) in _score(seen, guesses).items():
            cosine[row].append(plain)
            within[row].append(inner)
    if not positions:
        raise UserError("hidden features: no held-out pictures")
    return HiddenFeatures(_joined(cosine), _joined(within), positions, guesses.pictures)


def _joined(found: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {row: np.concatenate(parts) for row, parts in found.items()}


def _score(seen: Seen, guesses: Guesses) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    assert guesses.context is not None and guesses.token is not None and seen.predicted is not None
    mean = guesses.mean.to(seen.feature.device)
    wanted = seen.feature - mean
    nearest = nearest_context(seen.context, guesses.grid)
    own = seen.predicted - mean
    said = {
        "jarvis": (own, wanted),
        "mean": (torch.zeros_like(wanted), wanted),
        "nearest": (seen.feature.gather(1, nearest[..., None].expand_as(seen.feature)) - mean, wanted),
        "linear_context": (guesses.context(_context_inputs(seen, guesses.grid)), wanted),
        "linear_token": (guesses.token(seen.token), wanted),
        "another": (own, wanted.roll(1, 0)),
    }
    # Positions that count weigh alike within a picture, and pictures alike.
    weight = seen.hidden.double() / seen.hidden.sum(1, keepdim=True).clamp(min=1)

    def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        return (F.cosine_similarity(a, b, dim=-1).double() * weight).sum(1).cpu().numpy()

    def inner(value: torch.Tensor) -> torch.Tensor:
        return value - torch.einsum("nv,nvc->nc", weight.to(value.dtype), value)[:, None]

    return {row: (mean_cosine(a, b), mean_cosine(inner(a), inner(b))) for row, (a, b) in said.items()}
