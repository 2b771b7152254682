"""Every subset of the methods on batches at the edge: padding, refused and unusable samples, one sample, many pictures."""

from __future__ import annotations

import math
from typing import Any

import pytest

from opsin.data.schema import stable_hash

import jobs
import settings
from compare import gradient_difference, loss_difference
from settings import SUBSETS

EACH = pytest.mark.parametrize("subset", SUBSETS, ids=settings.name_of)
LONG = 1500
"""Tokens of the longest row here: six pictures."""


def step(subset: tuple[str, ...], samples: list[dict[str, Any]], refused: tuple[dict, ...] = (), **options: Any) -> dict[str, Any]:  # fmt: skip
    """One step on some samples, of which some are refused by a method of nobody's."""
    guard = ("methods:Refuse", {"uids": tuple(stable_hash(s["id"]) for s in refused)})
    return jobs.train(
        samples=samples, global_batch=len(samples), steps=1, algorithms=[guard, *settings.algorithms(subset)],
        max_seq_len=LONG, **settings.MODEL, **options,
    )  # fmt: skip


@EACH
def test_what_is_unusable_or_refused_changes_nothing_in_rows_and_in_packs(subset: tuple[str, ...]) -> None:
    """Micro-batches of 1: those of the unusable samples are padding alone. The reference never had any of them."""
    good = [settings.caption(1, 2), settings.question(2, turns=2), settings.words(3, 3)]
    refused = (settings.question(30, 2), settings.words(31), settings.caption(33))
    more = [
        settings.unusable(90),
        good[0],
        refused[0],
        good[1],
        refused[1],
        settings.unusable(91),
        good[2],
        refused[2],
    ]
    alone = step(subset, good)
    for options in ({"microbatch": 1}, {"microbatch": 4, "packing": True}):
        found = step(subset, more, refused, **options)
        assert found["keys"] == alone["keys"]
        assert loss_difference(alone, found) < 1e-5, options
        assert gradient_difference(alone, found) < 1e-5, options


@EACH
def test_batches_of_one_sample(subset: tuple[str, ...]) -> None:
    """With six pictures; with nothing but padding; with words alone."""
    samples = [settings.caption(1, 6), settings.unusable(90), settings.words(2, 2)]
    found = jobs.train(
        samples=samples, global_batch=1, steps=3, max_seq_len=LONG, algorithms=settings.algorithms(subset),
        **settings.MODEL,
    )  # fmt: skip
    own = settings.own_keys(subset)
    for i, losses in enumerate(found["losses"]):
        assert all(map(math.isfinite, losses.values()))
        assert (losses["loss/train/lm"] != 0) == (i != 1)
        for key in own:
            assert (losses[key] != 0) == (i == 0), (i, key)
    assert not any(g.any() for g in found["gradients"][1].values())
    heads = [
        [g for n, g in gradients.items() if n.startswith("net.auxiliary.")]
        for gradients in found["gradients"]
    ]
    assert all(bool(g.any()) for g in heads[0]) and not any(bool(g.any()) for g in heads[2])
    assert all(bool(w.isfinite().all()) for w in found["weights"].values())
