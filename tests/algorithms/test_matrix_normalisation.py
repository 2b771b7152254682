"""Losses and gradients do not depend on how a global batch is cut: 1 x 8, 2 x 4, 4 x 2 samples, micro-batches of 8 to 1.

Three global batches at the same weights (rate 0): unequal numbers of labels and pictures; pictures on one rank alone; no
pictures at all. A difference is relative to the largest value of its kind; see ``compare``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import jobs
import settings
import zoo
from compare import gradient_difference, loss_difference
from ranks import RankPool
from settings import SUBSETS

ALL = SUBSETS[-1]
EXACT = 1e-5
SOME = [(), *[(name,) for name in settings.METHODS], ALL]
"""Subsets of the slow product; the others are pairs that ``test_matrix_ranks.py`` has."""


def options(subset: tuple[str, ...], family: str) -> dict[str, Any]:
    return {
        "family": family, "samples": settings.uneven(), "steps": 3, "lr": 0.0, "max_seq_len": 1500,
        "algorithms": settings.algorithms(subset), **settings.MODEL,
    }  # fmt: skip


@cache
def whole(subset: tuple[str, ...], family: str) -> dict[str, Any]:
    """One process, one micro-batch."""
    return jobs.train(**options(subset, family))


def hold(found: list[dict[str, Any]], subset: tuple[str, ...], family: str) -> None:
    one = whole(subset, family)
    assert [bool(losses.get("loss/train/ross", 1)) for losses in one["losses"]][:2] == [True, True]
    for result in found:
        assert result["keys"] == one["keys"]
        assert loss_difference(one, result) < EXACT
        assert gradient_difference(one, result) < EXACT


def on(pool: RankPool, parallel: str, microbatch: int, subset: tuple[str, ...], family: str) -> None:
    found = pool.run(
        "jobs:train", **options(subset, family), parallel=parallel, microbatch=microbatch, timeout=240
    )
    assert len(found) == pool.world and all(r["fsdp"] == (parallel == "fsdp2") for r in found)
    hold(found, subset, family)


@pytest.mark.parametrize(
    "on_tokens", [pytest.param(False, marks=pytest.mark.slow), True], ids=["by samples", "by tokens"]
)
@pytest.mark.parametrize("microbatch", [4, 2, 1])
def test_micro_batches(microbatch: int, on_tokens: bool) -> None:
    """Whatever Composer scales a micro-batch by: terms that count pictures are not weighed by tokens."""
    cut = jobs.train(**options(ALL, "llava"), microbatch=microbatch, accumulate_on_tokens=on_tokens)
    hold([cut], ALL, "llava")


@pytest.mark.world
@pytest.mark.parametrize(
    ("parallel", "microbatch"),
    [
        ("ddp", 4),
        pytest.param("ddp", 1, marks=pytest.mark.slow),
        ("fsdp2", 2),
        pytest.param("fsdp2", 1, marks=pytest.mark.slow),
    ],
)
def test_two_ranks(parallel: str, microbatch: int, ranks: RankPool) -> None:
    on(ranks, parallel, microbatch, ALL, "llava")


@pytest.mark.world
@pytest.mark.parametrize(("parallel", "microbatch"), [("ddp", 2), ("fsdp2", 1)])
def test_four_ranks(parallel: str, microbatch: int, four_ranks: RankPool) -> None:
    """Three of them have no picture in the second batch, all of them none in the third."""
    on(four_ranks, parallel, microbatch, ALL, "llava")


@pytest.mark.slow
@pytest.mark.world
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("subset", SOME, ids=settings.name_of)
def test_all_ways(subset: tuple[str, ...], family: str, ranks: RankPool, four_ranks: RankPool) -> None:
    for microbatch in (4, 2, 1):
        hold([jobs.train(**options(subset, family), microbatch=microbatch)], subset, family)
    for parallel in ("ddp", "fsdp2"):
        for microbatch in (4, 2, 1):
            on(ranks, parallel, microbatch, subset, family)
        for microbatch in (2, 1):
            on(four_ranks, parallel, microbatch, subset, family)
