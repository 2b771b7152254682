"""JARVIS's masks as its procedure is stated: loops over samples, pictures and blocks, lists of indexes.

What ``jarvis_masks.py`` measures ours against. The steps are those that the paper's code goes through: each block is drawn
until it fits, becomes a list of patches, and is written into the mask on its own. Sizes of blocks are drawn for each
picture, as our default has it, and nothing is cut to a common length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from opsin.algorithms.jarvis.sampler import BLOCKS, CONTEXT, MaskConfig

FAILURES = 20
"""Draws of a context block before one target is no longer cut out of it."""


@dataclass
class Blocks:
    """One picture's masks, as patches in raster order.

    Attributes:
        context: (n,) int64.
        targets: (n_j,) int64 of each block.
    """

    context: torch.Tensor
    targets: list[torch.Tensor]

    @classmethod
    def of(cls, code: torch.Tensor, blocks: int) -> Blocks:
        """From our codes (n,) of one picture's patches."""
        bits = code & BLOCKS
        return cls(
            (code & CONTEXT).nonzero().squeeze(1),
            [((bits >> j) & 1).nonzero().squeeze(1) for j in range(blocks)],
        )


def _size(generator: torch.Generator, grid: tuple[int, int], scale: tuple, aspect: tuple) -> tuple[int, int]:
    u = torch.rand(1, generator=generator).item()
    area = math.floor(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(sides[0], grid[0]), min(sides[1], grid[1])


def _rectangle(generator: torch.Generator, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    top = int(torch.randint(0, grid[0] - size[0] + 1, (1,), generator=generator))
    left = int(torch.randint(0, grid[1] - size[1] + 1, (1,), generator=generator))
    inside = torch.zeros(grid, dtype=torch.int32)
    inside[top : top + size[0], left : left + size[1]] = 1
    return inside


def sample_blocks(generator: torch.Generator, grid: tuple[int, int], config: MaskConfig) -> Blocks:
    """Draw one picture's blocks (fact sheet, section 2)."""
    least = config.min_keep * grid[0] * grid[1]
    target = _size(generator, grid, config.scale, config.aspect)
    context = _size(generator, grid, config.context_scale, (1.0, 1.0))
    targets, outside = [], []
    for _ in range(config.blocks):
        while True:
            inside = _rectangle(generator, grid, target)
            patches = inside.flatten().nonzero().squeeze(1)
            if len(patches) > least:
                break
        targets.append(patches)
        outside.append(1 - inside)
    tries = 0
    while True:
        inside = _rectangle(generator, grid, context)
        for one in outside[: config.blocks - tries // FAILURES]:
            inside = inside * one
        patches = inside.flatten().nonzero().squeeze(1)
        if len(patches) > least:
            return Blocks(patches, targets)
        tries += 1


Placed = list[list[tuple[int, int, Blocks]]]
"""For each row its pictures: first position, first position behind, blocks."""


def place(
    input_ids: torch.Tensor, image_token: int, pictures: list[list[Blocks]], patches: int
) -> tuple[Placed, torch.Tensor, torch.Tensor]:
    """Where the pictures of each row are, and what is hidden.

    Returns:
        where each picture lies; (B, L) bool, hidden tokens; (n,) int64 positions in the flattened tokens of what is
        predicted, block by block.
    """
    placed, hidden, wanted = [], torch.zeros_like(input_ids, dtype=torch.bool), []
    length = input_ids.shape[1]
    for b, row in enumerate(pictures):
        at = (input_ids[b] == image_token).nonzero().squeeze(1)
        placed.append([])
        for i, blocks in enumerate(row):
            start = int(at[i * patches])
            placed[b].append((start, start + patches, blocks))
            for block in blocks.targets:
                hidden[b, start + block] = True
                wanted.append(b * length + start + block)
    return placed, hidden, torch.cat(wanted)


def write_mask(attention_mask: torch.Tensor, placed: Placed, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, L, L) by the steps of the fact sheet, section 3.1: bool, or additive where ``dtype`` is a float."""
    additive = dtype.is_floating_point
    no, yes = (torch.finfo(dtype).min, 0.0) if additive else (False, True)
    batch, length = attention_mask.shape
    # Step 0: causal, images as squares, padding.
    causal = torch.full((length, length), no, dtype=dtype).triu_(1) if additive else None
    causal = torch.ones(length, length, dtype=torch.bool).tril_() if causal is None else causal
    mask = causal.expand(batch, 1, length, length).clone()
    for b, row in enumerate(placed):
        for start, stop, _ in row:
            mask[b, 0, start:stop, start:stop] = yes
    if additive:
        mask.masked_fill_(attention_mask[:, None, None] == 0, no)
    else:
        mask.logical_and_(attention_mask[:, None, None].bool())  # several times as fast as filling
    for b, row in enumerate(placed):
        for start, stop, blocks in row:
            mask[b, 0, start:stop] = no  # step 1
            mask[b, 0, start:, start + blocks.context] = yes  # step 2
            for block in blocks.targets:  # step 3
                at = start + block
                mask[b, 0, at[:, None], at[None]] = yes
            for block in blocks.targets:  # step 4
                mask[b, 0, stop:, start + block] = yes
    return mask
