"""What a step works on: samples, tokens, pictures; assumed where no data is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ...data.schema import IGNORE_INDEX
from ...models.errors import UserError, nearest
from ...models.geometry import PIXEL_KEY

Grid = tuple[int, int]


@dataclass
class Load:
    """What operations are counted of.

    Attributes:
        tokens: real ones, visual ones included.
        pairs: sum over rows of the square of their tokens.
        labelled: tokens that the head of the language model predicts.
        visual: tokens that the projector makes.
        pictures: (channels-first) shape of one picture or tile as the tower gets it -> how many; of towers that take
            patches of any picture: (patches,) -> how many pictures.
        grids: (rows, columns) of a view -> how many.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    labelled: float = 0.0
    visual: float = 0.0
    pictures: dict[tuple[int, ...], float] = field(default_factory=dict)
    grids: dict[Grid, float] = field(default_factory=dict)


def load_of_batch(batch: Mapping[str, Any], merge: int = 1) -> Load:
    """The load of a device batch, on the CPU or not; ``merge``: patches of the tower in a visual token."""
    lengths = batch["attention_mask"].sum(1).double()
    weights = batch["loss_weights"] > 0
    labelled = ((batch["labels"] != IGNORE_INDEX) & weights).sum()
    grids: dict[Grid, float] = {}
    for rows, columns in batch["view_grid"].tolist():
        grids[rows, columns] = grids.get((rows, columns), 0.0) + 1
    visual = float(sum(rows * columns * count for (rows, columns), count in grids.items()))
    pictures: dict[tuple[int, ...], float] = {}
    pixels: torch.Tensor | None = batch.get(PIXEL_KEY)
    if pixels is not None and pixels.ndim >= 4:
        shape = tuple(pixels.shape[-3:])
        pictures[shape] = float(pixels.numel() // (shape[0] * shape[1] * shape[2]))
    elif pixels is not None:
        for (rows, columns), count in grids.items():
            pictures[rows * columns * merge,] = pictures.get((rows * columns * merge,), 0.0) + count
    total, pairs, found = torch.stack([lengths.sum(), lengths.square().sum(), labelled.double()]).tolist()
    return Load(total, pairs, found, visual, pictures, grids)


@dataclass
class Assumed:
    """What ``plan:`` of a configuration may say of a stage's data, which the plan does not read.

    Attributes:
        samples: in the data set; 0: not known.
        text_tokens: of a sample, beside its visual tokens.
        labelled_tokens: of these, those that are learnt.
        images: pictures a sample.
        longest_tokens: of a row; memory is that of a micro-batch of such rows. 0: ``max_seq_len``, at most 4096.
        image_bytes: of a stored picture.
    """

    samples: int = 0
    text_tokens: float = 200.0
    labelled_tokens: float = 100.0
    images: float = 1.0
    longest_tokens: int = 0
    image_bytes: float = 100e3


def assumed(plan: Mapping[str, Any], stage: str, plain: bool, where: Any) -> Assumed:
    """The assumptions of a stage: its section of ``plan:``, else the defaults (of captions where the template is plain).

    Raises:
        UserError: an unknown key, or a value that is no number.
    """
    given = plan.get(stage) or {}
    known = {f.name for f in fields(Assumed)}
    if not isinstance(given, Mapping):
        raise UserError(f"{where(stage)}: expected a mapping of {', '.join(sorted(known))}")
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{where(stage, str(key))}: unknown key{nearest(str(key), known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UserError(f"{where(stage, str(key))}: expected a number, 0 or more, got {value!r}")
    defaults = {"text_tokens": 25.0, "labelled_tokens": 25.0} if plain else {}
    return Assumed(**{**defaults, **given})


def load_of_sample(assume: Assumed, grid: Grid, picture: tuple[int, ...], visual: float) -> Load:
    """The load of a mean sample.

    Args:
        assume: of its stage.
        grid: of a view.
        picture: shape of a picture.
        visual: tokens of a picture.
    """
    tokens = assume.text_tokens + assume.images * visual
    return Load(
        tokens,
        tokens**2,
        assume.labelled_tokens,
        assume.images * visual,
        {picture: assume.images},
        {grid: assume.images},
    )
