"""Does a target say what questions ask about? A linear probe reads objects' attributes from target tokens.

A method that reconstructs a target can only teach a model what the target holds. So, before any training: on
scenes made on the fly, colour and size of each object are read off the tokens around it by multinomial
logistic regression, fitted on some scenes and scored on others. Beside it stand two rows that know nothing of the
picture: the most frequent answer, and the same probe given the tokens of another scene at the same place (which
tells a little of a size; where a large object's centre can lie may be why, it was not looked into).

``opsin data audit-target TARGET``, 4,000 + 1,000 scenes, 1,526 objects asked about, one seed:

====================  ==========  ==========  =================  ===================
target                colour      size        majority           another picture
====================  ==========  ==========  =================  ===================
autoencoder           .999        .999        .135, .514         .130, .609
pixels, cell 8        .999        1.000       .135, .514         .126, .566
pixels, cell 16       .985        .976        .135, .514         .132, .580
====================  ==========  ==========  =================  ===================

Standard errors are .004 at most (.013 in the last column). Scenes are easy to read linearly; what the audit finds
out is a target that has lost something, as an auto-encoder does that spends its bits on walls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from torch.nn import functional as F

from ..algorithms.ross.targets import Target
from ..data.scenes import COLOURS, SIZES, Scene, SceneConfig, scene
from ..models.errors import UserError
from .linear_probe import majority, probe

AUDIT_SEED = 2_000_000
"""Scenes of a seed that no dataset and no training of ours uses."""

ATTRIBUTES = {"colour": COLOURS, "size": SIZES}
LEAST_VISIBLE = 0.75
"""Objects that are hidden by more than a quarter are not asked about: what is behind is no fault of a target's."""

PASS = 0.95


@dataclass(frozen=True)
class Audit:
    """What the probe read of one attribute, on held-out scenes.

    Attributes:
        attribute: ``colour`` or ``size``.
        n: objects asked about.
        accuracy: share read rightly, 0 .. 1.
        standard_error: of ``accuracy``, objects taken for independent.
        majority: accuracy of the training scenes' most frequent value.
        elsewhere: accuracy of a probe fitted and scored on tokens of another scene, at the object's place.
    """

    attribute: str
    n: int
    accuracy: float
    standard_error: float
    majority: float
    elsewhere: float

    @property
    def passed(self) -> bool:
        """Whether the target holds the attribute."""
        return self.accuracy >= PASS


def audited_scenes(size: int = 64) -> SceneConfig:
    """One or two objects of uniformly drawn attributes and nothing else, on ``size`` pixels."""
    return SceneConfig(size=size, objects=(1, 2), sign=0, charts=0, kinds=("colour", "size"), questions=1)


def audit(
    target: Target,
    *,
    scenes: int = 4000,
    held_out: int = 1000,
    config: SceneConfig | None = None,
    window: int = 3,
    seed: int = AUDIT_SEED,
) -> list[Audit]:
    """Audit a target: one row for each of ``ATTRIBUTES``.

    Args:
        target: what would be reconstructed. Of a posterior, the mean is read.
        scenes: pictures that the probe is fitted on.
        held_out: further pictures that it is scored on.
        config: of the scenes; default: :func:`audited_scenes`.
        window: side in tokens of the square around the object's centre that the probe sees, joined along the
            channels; places outside the picture are zero.
        seed: of scenes and probe.

    Raises:
        UserError: the scenes' size is no multiple of the target's cell, or an even window.
    """
    config = config or audited_scenes()
    if scenes < 2 or held_out < 2:
        raise UserError(f"scenes, held_out: at least 2 each, got {scenes} and {held_out}")
    if config.size % target.cell:
        raise UserError(f"size: {config.size} pixels are no multiple of the target's cell of {target.cell}")
    if window < 1 or window % 2 == 0:
        raise UserError(f"window: an odd number of tokens, got {window}")
    shown = [scene(config, seed, "uniform", i) for i in range(scenes + held_out)]
    maps = _maps(target, shown, config.size // target.cell)
    mean, deviation = (f(maps[:scenes], dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    maps = (maps - mean) / deviation.clamp_min(1e-6)
    asked = [
        (i, j)
        for i, picture in enumerate(shown)
        for j, thing in enumerate(picture.objects)
        if thing.visible >= LEAST_VISIBLE * thing.pixels
    ]
    owner = torch.tensor([i for i, _ in asked])
    train = owner < scenes
    own = _windows(maps, owner, shown, asked, target.cell, window)
    # The next scene of the same part, so that no held-out picture is ever seen in training.
    following = torch.where(train, (owner + 1) % scenes, scenes + (owner - scenes + 1) % held_out)
    other = _windows(maps, following, shown, asked, target.cell, window)
    rows = []
    for attribute, values in ATTRIBUTES.items():
        labels = torch.tensor([values.index(getattr(shown[i].objects[j], attribute)) for i, j in asked])
        n = int((~train).sum())
        accuracy = probe(own[train], labels[train], own[~train], labels[~train], len(values))
        elsewhere = probe(other[train], labels[train], other[~train], labels[~train], len(values))
        error = math.sqrt(accuracy * (1 - accuracy) / n)
        often = majority(labels[train], labels[~train])
        rows.append(Audit(attribute, n, accuracy, error, often, elsewhere))
    return rows


def _maps(target: Target, shown: Sequence[Scene], side: int) -> torch.Tensor:
    """(scenes, C, side, side) float32 on the CPU."""
    pictures = [torch.from_numpy(np.array(s.picture)).permute(2, 0, 1).float() / 255 for s in shown]
    tokens = target.moments(pictures, [(side, side)] * len(shown))[:, : target.dim].float().cpu()
    return tokens.reshape(len(shown), side, side, target.dim).permute(0, 3, 1, 2)


def _windows(
    maps: torch.Tensor,
    source: torch.Tensor,
    shown: Sequence[Scene],
    asked: Sequence[tuple[int, int]],
    cell: int,
    window: int,
) -> torch.Tensor:
    """Tokens around each object's centre, (objects, window * window * C), taken from scenes ``source``."""
    padded = F.pad(maps, (window // 2,) * 4)
    found = []
    for picture, (i, j) in zip(source.tolist(), asked, strict=True):
        left, top, side = shown[i].objects[j].frame
        column, row = int((left + side / 2) // cell), int((top + side / 2) // cell)
        found.append(padded[picture, :, row : row + window, column : column + window].flatten())
    return torch.stack(found)


def as_table(rows: Sequence[Audit], title: str) -> Table:
    """The audit for a terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("attribute")
    for header in ("n", "probe", "majority", "another picture", ""):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            row.attribute,
            str(row.n),
            f"{row.accuracy:.3f} ±{row.standard_error:.3f}",
            f"{row.majority:.3f}",
            f"{row.elsewhere:.3f}",
            "passed" if row.passed else f"below {PASS}",
        )
    return table
