"""A placebo for methods that predict a function of the picture: what another picture of the micro-batch is.

Everything stays as it is (heads, noise, masks, cost, the spread of targets); only what there is to learn about the
picture that is shown has gone. A partner depends on what a micro-batch happens to hold: this is a control, no method.
"""

from __future__ import annotations

from typing import Any

import torch

from ..data.batch import CUT

VIEWS, FOUND, PATCHES = "partners/views", "partners/found", "partners/patches"
"""Keys of a micro-batch, V views and P patches: ordinals of each view's partner, itself where it has none (a tuple, the
host's own numbers); whether it has one, (V,) bool; and the patch in the same place of the partner, (P,) int64."""

ALONE = {
    "device_train_microbatch_size=1": "shuffle_targets: a sample with one picture has no other one in its micro-batch, so that "
    "nothing is learnt"
}
"""What a method with ``shuffle_targets`` warns of."""


def shuffle(batch: dict[str, Any]) -> None:
    """Have every micro-batch of a device batch find its partners when it is cut."""
    batch[CUT + "partners"] = partners


def partners(part: dict[str, Any]) -> dict[str, Any]:
    """The next picture of a micro-batch, cyclically, among views with as many rows and columns of patches.

    The k-th view of a picture takes the k-th one of those that follow it and are of other pictures. Without randomness.

    Args:
        part: a micro-batch, on the CPU: ``view_grid`` (V, 2), ``view_row``, ``view_document``, ``view_image`` (V,).

    Returns:
        :data:`VIEWS`, :data:`FOUND`, :data:`PATCHES`.
    """
    grid = part["view_grid"]
    count = len(grid)
    if not count:
        nothing = torch.zeros(0, dtype=torch.int64)
        return {VIEWS: (), FOUND: nothing.bool(), PATCHES: nothing}
    # A picture is its row, document and number there; one of several tilings has views of several grids.
    whose = torch.stack([part["view_row"], part["view_document"], part["view_image"]]).long().T
    kind = torch.unique(grid, dim=0, return_inverse=True)[1]
    order = kind.argsort(stable=True)  # views in order of appearance, grid by grid
    place = torch.arange(count)
    group, first = _runs(kind[order][:, None])
    picture, start = _runs(torch.cat([kind[order][:, None], whose[order]], 1))
    size, own = group.bincount()[group], picture.bincount()[picture]
    others = size - own
    step = own + (place - start) % others.clamp(min=1)  # from its picture's first view
    chosen = torch.where(others > 0, first + (start - first + step) % size, place)
    partner = torch.empty_like(order)
    partner[order] = order[chosen]
    found = torch.empty(count, dtype=torch.bool)
    found[order] = others > 0
    patches = grid.prod(1).long()
    begin = patches.cumsum(0) - patches
    view = torch.repeat_interleave(place, patches)
    there = torch.arange(len(view)) + (begin[partner] - begin)[view]
    return {VIEWS: tuple(partner.tolist()), FOUND: found, PATCHES: there}


def _runs(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which run of equal rows each row of (n, k) is in, and where that run starts: (n,) int64 both."""
    new = torch.ones(len(values), dtype=torch.bool)
    new[1:] = (values[1:] != values[:-1]).any(1)
    run = new.cumsum(0) - 1
    return run, new.nonzero().squeeze(1)[run]
