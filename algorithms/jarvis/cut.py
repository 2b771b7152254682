"""What a micro-batch needs to know of its masks in numbers of the host's, worked out on the CPU when it is cut."""

from __future__ import annotations

from typing import Any

import torch

from ..partners import FOUND, PATCHES, partners
from .functional import on_tokens
from .sampler import BLOCKS, CONTEXT

CODE, WEIGHT = "patch/jarvis", "patch/jarvis_weight"
"""Keys of a batch: codes (P,) int16 and weights in the loss (P,) float32 of all patches."""


def cut(part: dict[str, Any], *, branch: bool, see_pretext: bool, shuffle: bool = False) -> dict[str, Any]:
    """Indexes of a micro-batch.

    Args:
        part: the micro-batch, on the CPU, with :data:`CODE` and :data:`WEIGHT`.
        branch: masked views run alone: also list their tokens.
        see_pretext: ... with what precedes them in their document.
        shuffle: hold views against others (``algorithms.partners``); those for which there is none are left as they are.

    Returns:
        ``jarvis/views`` (tuple of ordinals of views with targets), ``jarvis/targets`` (n,) int64 ordinals of target
        patches, ``jarvis/sources`` (n,) int64 those whose features they are held against (the same, unless shuffled),
        ``jarvis/teaching`` (tuple of ordinals of the sources' views), ``jarvis/among`` (n,) int64 the sources' ordinals
        among the patches of those views alone, ``jarvis/weights`` (n,) float32; with ``shuffle`` codes and weights
        without those of views that are alone; and with ``branch``: ``jarvis/branch`` (W, M) int64 positions into the flattened tokens, -1
        padding, ``jarvis/branch_code`` (W, M) int16, ``jarvis/branch_view`` (W, M) int64 ordinal of a token's view or -1,
        ``jarvis/branch_at`` (n,) int64 targets in the flattened (W * M).
    """
    code, weight, view = part[CODE], part[WEIGHT], part["patch_view"]
    out: dict[str, Any] = {}
    other: torch.Tensor | None = None
    if shuffle:
        found = partners(part)
        paired, other = found[FOUND][view], found[PATCHES]
        code, weight = torch.where(paired, code, 0), torch.where(paired, weight, 0.0)
        out = {CODE: code, WEIGHT: weight}
    targets = (weight > 0).nonzero().squeeze(1)
    sources = targets if other is None else other[targets]
    views, teaching = torch.unique(view[targets]), torch.unique(view[sources])
    chosen = torch.zeros(len(part["view_row"]), dtype=torch.bool)
    chosen[teaching] = True
    among = chosen[view].cumsum(0) - 1
    out |= {
        "jarvis/views": tuple(views.tolist()),
        "jarvis/targets": targets,
        "jarvis/sources": sources,
        "jarvis/teaching": tuple(teaching.tolist()),
        "jarvis/among": among[sources],
        "jarvis/weights": weight[targets],
    }
    if branch:
        out.update(_branch(part, code, views, see_pretext))
    return out


def _branch(
    part: dict[str, Any], code: torch.Tensor, views: torch.Tensor, see_pretext: bool
) -> dict[str, torch.Tensor]:
    """Tokens that predictions depend on, one masked view a row: its context and targets; with ``see_pretext`` also all
    that precedes it in its document, since words see pictures that come before them, masked as they are."""
    shape = part["input_ids"].shape
    if not len(views):  # one token all the same: every rank runs the same layers
        nothing = torch.zeros(0, dtype=torch.int64)
        return {
            "jarvis/branch": torch.full((1, 1), -1),
            "jarvis/branch_code": torch.zeros(1, 1, dtype=torch.int16),
            "jarvis/branch_view": torch.full((1, 1), -1),
            "jarvis/branch_at": nothing,
        }
    position = part["patch_position"]
    token_code = on_tokens(code, position, shape, 0)
    token_view = on_tokens(part["patch_view"], position, shape, -1)
    row, length = part["view_row"][views], shape[1]
    code_of, view_of = token_code[row], token_view[row]  # (W, L)
    own = view_of == views[:, None]
    member = own & ((code_of & (CONTEXT | BLOCKS)) != 0)
    if see_pretext:
        before = torch.arange(length) < part["view_start"][views][:, None]
        same = part["document_ids"][row] == part["view_document"][views][:, None]
        member = member | (before & same & (part["branch_ids"][row] == 0) & (part["attention_mask"][row] > 0))
    most = int(member.sum(1).max())
    order = (~member).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    real = member.gather(1, order)
    branch_code = torch.where(real, code_of.gather(1, order), 0)
    branch_view = torch.where(real, view_of.gather(1, order), -1)
    targets = ((branch_code & BLOCKS) != 0) & (branch_view == views[:, None])
    return {
        "jarvis/branch": torch.where(real, row[:, None] * length + order, -1),
        "jarvis/branch_code": branch_code,
        "jarvis/branch_view": branch_view,
        "jarvis/branch_at": targets.flatten().nonzero().squeeze(1),
    }
