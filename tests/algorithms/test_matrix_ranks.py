"""Subsets of the methods x families x ranks x micro-batches x packing x precision: the numbers of one process.

``make test`` runs a pairwise cover of half of the subsets, ``make test-all`` the product. Every case is one step on one global batch of 8 and is
held against the same step in one process, one micro-batch, unpacked.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import jobs
import settings
import zoo
from compare import gradient_difference, loss_difference
from pairwise import pairs_of, pairwise
from ranks import RankPool
from settings import SUBSETS

FACTORS: dict[str, tuple] = {
    "subset": SUBSETS,
    "family": zoo.FAMILIES,
    "parallel": ("one", "ddp", "fsdp2"),
    "microbatch": (8, 4, 2, 1),
    "packing": (False, True),
    "precision": ("fp32", "bf16"),
    "words": ("masked", "unmasked"),
}
"""``words``: which image JARVIS lets words see. Ranks: two."""

SOME = [(), *[(name,) for name in settings.METHODS], ("ross", "jarvis"), ("l2t", "vift"), SUBSETS[-1]]
COVERED = {**FACTORS, "subset": SOME, "microbatch": (8, 2, 1)}
"""What ``make test`` covers: each method alone, those with heads, those about words, all of them.

On two ranks a micro-batch of 8 is one of 4; in one process ``test_matrix_normalisation.py`` has it.
"""
CASES = pairwise(COVERED)
EXACT = 1e-5
BF16 = {"losses": 2e-2, "cosine": 0.97}
"""Autocast to 8 bits of mantissa: sums in another order differ in the second digit."""


def name_of(case: dict[str, Any]) -> str:
    return "-".join(
        ("packed" if value else "rows") if key == "packing" else settings.name_of(value) if key == "subset" else str(value)
        for key, value in case.items()
    )  # fmt: skip


def options(subset: tuple[str, ...], family: str, precision: str, words: str) -> dict[str, Any]:
    """What a case and its reference share."""
    return {
        "family": family, "samples": settings.short(), "steps": 1, "autocast": precision == "bf16",
        "algorithms": settings.algorithms(subset, jarvis={"text_loss": words}), "max_seq_len": 1500, **settings.MODEL,
    }  # fmt: skip


@cache
def reference(subset: tuple[str, ...], family: str, precision: str, words: str) -> dict[str, Any]:
    return jobs.train(**options(subset, family, precision, words))


def hold(case: dict[str, Any], ranks: RankPool) -> None:
    """Run a case and compare it."""
    subset, parallel = case["subset"], case["parallel"]
    words = case["words"] if "jarvis" in subset else "masked"
    shared = (subset, case["family"], case["precision"], words)
    one = reference(*shared)
    more = {"microbatch": min(case["microbatch"], 8 if parallel == "one" else 4), "packing": case["packing"]}
    if parallel == "one":
        found = [jobs.train(**options(*shared), **more, accumulate_on_tokens=case["packing"])]
    else:
        found = ranks.run("jobs:train", **options(*shared), **more, parallel=parallel)
    own = settings.own_keys(subset)
    for result in found:
        assert result["keys"] == one["keys"] == [["loss/train/total", "loss/train/lm", *own]]
        assert result["fsdp"] == (parallel == "fsdp2") and (
            parallel != "fsdp2" or not result["plain_parameters"]
        )
        assert all(math.isfinite(v) and v != 0 for v in result["losses"][0].values())
        # Alike on all ranks, to the bit.
        assert all(torch.equal(g, result["gradients"][0][n]) for n, g in found[0]["gradients"][0].items())
    if case["precision"] == "fp32":
        assert loss_difference(one, found[0]) < EXACT
        assert gradient_difference(one, found[0]) < EXACT
        return
    assert loss_difference(one, found[0]) < BF16["losses"]
    a, b = (torch.cat([r["gradients"][0][n].flatten() for n in one["gradients"][0]]) for r in (one, found[0]))
    assert float(F.cosine_similarity(a, b, 0)) > BF16["cosine"]


def test_the_cover_has_every_pair() -> None:
    covered = set().union(*map(pairs_of, CASES))
    assert covered == {p for c in map(dict, product(*[[(k, v) for v in vs] for k, vs in COVERED.items()])) for p in pairs_of(c)}  # fmt: skip
    assert len(CASES) < 40


@pytest.mark.world
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_pairwise_cover(case: dict[str, Any], ranks: RankPool) -> None:
    hold(case, ranks)


@pytest.mark.slow
@pytest.mark.world
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", zoo.FAMILIES)
@pytest.mark.parametrize("subset", SUBSETS, ids=settings.name_of)
def test_the_product(subset: tuple[str, ...], family: str, ranks: RankPool) -> None:
    others = [key for key in FACTORS if key not in ("subset", "family")]
    for values in product(*[FACTORS[key] for key in others]):
        case = {"subset": subset, "family": family, **dict(zip(others, values, strict=True))}
        if "jarvis" in subset or case["words"] == "masked":
            hold(case, ranks)
