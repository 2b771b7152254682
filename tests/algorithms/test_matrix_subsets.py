"""Every subset of the methods: it trains, a method that is off is one that is not there, and training goes on from a checkpoint.

All in one process, on three global batches: mixed, text-only, mixed; heads are loud, so that all methods pull at the
language model from the first step. Ranks, micro-batches, families, packing and precision: ``test_matrix_ranks.py``.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.models.errors import UserError
from opsin.training.compat import load_plain

import jobs
import settings
from compare import same_bits
from settings import METHODS, SUBSETS, make

EACH = pytest.mark.parametrize("subset", SUBSETS, ids=settings.name_of)
MOST = pytest.mark.parametrize(
    "subset",
    [pytest.param(s, marks=pytest.mark.slow) if len(s) == 3 else s for s in SUBSETS],
    ids=settings.name_of,
)
"""For tests that train a subset again without each of its methods."""
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("subsets")


def samples(spared: bool = False) -> list[dict[str, Any]]:
    """Of three steps; ``spared``: without documents that some method refuses."""
    batch = settings.without_questions if spared else settings.mixed
    return [*batch(1), *settings.text_only(20), *batch(11)]


@cache
def run(
    subset: tuple[str, ...],
    off: tuple[str, ...] = (),
    among: tuple[str, ...] = (),
    spared: bool = False,
    **trainer: Any,
) -> dict[str, Any]:
    """A training of a subset; once for all tests."""
    return jobs.train(
        samples=samples(spared), global_batch=4, microbatch=2, steps=STEPS, trainer=trainer,
        algorithms=settings.algorithms(subset, off, among), **settings.MODEL,
    )  # fmt: skip


def saved(subset: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """The training of a subset, with a checkpoint after each step in ``folder / name``."""
    place = str(folder / settings.name_of(subset))
    return run(subset, save_folder=place, save_interval="1ba")


def checkpoint(subset: tuple[str, ...], folder: Path, step: int) -> str:
    return str(folder / settings.name_of(subset) / f"ep0-ba{step}-rank0.pt")


def vision(path: str) -> dict[str, torch.Tensor]:
    """Weights of the projector in a checkpoint."""
    return {k: v for k, v in load_plain(path)["state"]["model"].items() if "projector" in k}


@EACH
def test_it_trains(subset: tuple[str, ...], folder: Path) -> None:
    result = saved(subset, folder)
    own = settings.own_keys(subset)
    assert all(keys == ["loss/train/total", "loss/train/lm", *own] for keys in result["keys"])
    for step, losses in enumerate(result["losses"]):
        assert all(torch.isfinite(torch.tensor(v)) for v in losses.values())
        for key in own:
            assert (losses[key] != 0) == (step != 1)  # no pictures, no loss
        head = {n: g for n, g in result["gradients"][step].items() if n.startswith("net.auxiliary.")}
        assert all(bool(g.any()) == (step != 1) for g in head.values())
    heads = {n.split(".")[2] for n in result["weights"] if n.startswith("net.auxiliary.")}
    assert heads == {n for n in subset if METHODS[n].head}
    assert all(bool(w.isfinite().all()) for w in result["weights"].values())
    logged = {key for step in result["logged"] for key in step}
    assert {key for name in subset for key in METHODS[name].logs} <= logged
    before, after = (vision(checkpoint(subset, folder, step)) for step in (1, 2))
    assert all(torch.equal(v, after[k]) for k, v in before.items()) == ("vift" in subset)


@MOST
def test_each_of_its_methods_changes_it(subset: tuple[str, ...], folder: Path) -> None:
    """No cell of the matrix is another one in disguise."""
    result = saved(subset, folder)
    for name in subset:
        rest = run(tuple(n for n in subset if n != name), among=subset)
        assert [x["loss/train/lm"] for x in rest["losses"]] != [x["loss/train/lm"] for x in result["losses"]]


@MOST
def test_a_method_that_is_off_is_one_that_is_not_there(subset: tuple[str, ...]) -> None:
    for name in subset:
        rest = tuple(n for n in subset if n != name)
        spared = METHODS[name].spares
        off, without = run(subset, (name,), spared=spared), run(rest, among=subset, spared=spared)
        assert same_bits(off, without), name
        for a, b in zip(off["gradients"], without["gradients"], strict=True):
            assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
        assert off["uids"] == without["uids"]


@EACH
@pytest.mark.parametrize("step", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_goes_on_from_a_checkpoint(subset: tuple[str, ...], folder: Path, step: int) -> None:
    whole = saved(subset, folder)
    place = checkpoint(subset, folder, step)
    again = run(subset, load_path=place)
    assert again["losses"] == whole["losses"][step:]
    assert all(torch.equal(v, again["weights"][k]) for k, v in whole["weights"].items())
    for a, b in zip(again["gradients"], whole["gradients"][step:], strict=True):
        assert all(torch.equal(v, b[k]) for k, v in a.items())
    # The states of its methods are those that were saved, also of fresh ones that they are loaded into.
    states = dict(load_plain(place)["state"]["algorithms"])
    for name in subset:
        state = states[METHODS[name].where.split(":")[1]]
        changes = METHODS[name].beside.get("vift", {}) if "vift" in subset else {}
        method = make(name, **changes)
        method.load_state_dict({k: v for k, v in state.items() if k != "repr"})
        assert {k: v for k, v in method.state_dict().items() if k != "repr"} == {
            k: v for k, v in state.items() if k != "repr"
        }
        assert state["repr"] == repr(method)


def test_a_checkpoint_of_other_methods_is_refused_in_one_line(folder: Path) -> None:
    """Composer would leave a head out, or as it is, without a word."""
    for before, now, said in (
        (("ross", "l2t"), ("l2t",), "has heads of ross, which are not switched on here: .*init_from"),
        (("l2t",), ("ross", "jarvis"), "has none of jarvis, ross: .*init_from"),
        (("ross",), ("jarvis",), "has heads of ross, .* and has none of jarvis"),
    ):
        saved(before, folder)
        with pytest.raises(UserError, match=said) as error:
            run(now, load_path=checkpoint(before, folder, 1))
        assert "\n" not in str(error.value)
