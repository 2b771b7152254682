"""What each method owes by itself, from the table of settings."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from composer.core import Algorithm

from opsin.algorithms.base import VisionAlgorithm
from opsin.models.parts import named_parts
from opsin.training.registry import algorithms as registry

import jobs
import settings
from methods import Bench, Loud
from settings import METHODS, make

EACH = pytest.mark.parametrize("name", METHODS)


@cache
def run(name: str, steps: int = 2, **options: Any) -> dict[str, Any]:
    """The method alone on mixed batches of 4; without a name the base run."""
    subset = [name] if name else []
    samples = [*settings.mixed(1), *settings.mixed(11)][: 4 * steps]
    return jobs.train(
        samples=samples, global_batch=4, steps=steps, algorithms=settings.algorithms(subset), **settings.MODEL, **options
    )  # fmt: skip


def test_every_registered_method_is_in_the_table() -> None:
    made = {name: registry.get(name, "algorithms") for name in registry.names()}
    methods = {n: c for n, c in made.items() if isinstance(c, type) and issubclass(c, VisionAlgorithm)}
    ours = {n for n, c in methods.items() if c.__module__.startswith("opsin.")}  # other tests register theirs
    assert ours == set(METHODS)
    for name in ours:
        setting, cls = METHODS[name], made[name]
        assert cls is type(make(name)) and cls.name == name and cls.loss_keys == setting.keys
        assert ("images" in make(name).needs) == setting.images


@EACH
def test_it_trains(name: str) -> None:
    setting, result, plain = METHODS[name], run(name), run("")
    assert result["keys"][0] == [f"loss/train/{k}" for k in ("total", "lm", *setting.keys)]
    for losses in result["losses"]:
        assert all(torch.isfinite(torch.tensor(v)) for v in losses.values())
        assert all(losses[f"loss/train/{k}"] != 0 for k in setting.keys)
    changed = [k for k in plain["weights"] if not torch.equal(plain["weights"][k], result["weights"][k])]
    assert changed and set(result["weights"]) - set(plain["weights"]) == {
        n for n in result["weights"] if n.startswith(f"net.auxiliary.{name}.")
    }
    assert any(n.startswith("net.auxiliary.") for n in result["weights"]) == setting.head
    for step in result["logged"]:
        assert set(setting.logs) <= step.keys()


@pytest.mark.parametrize("name", [n for n, s in METHODS.items() if s.pulls])
def test_its_own_loss_reaches_what_it_should(name: str) -> None:
    """By itself, without the loss of words."""
    drill = Bench(make(name), size=32, bidirectional=True)
    Loud().apply(None, drill.state, drill.logger)  # type: ignore[arg-type]
    loss, moved = drill.step(drill.batch(settings.mixed(1)), 2)
    parts = {part for part, n, _ in named_parts(drill.model) if n in moved}
    assert loss != 0 and set(METHODS[name].pulls) <= parts <= {
        *METHODS[name].pulls,
        "mm_projector",
        "vision_tower",
    }
    head = dict(drill.model.net.auxiliary[name].named_parameters())
    assert {n.removeprefix(f"net.auxiliary.{name}.") for n in moved if "auxiliary" in n} == set(head)
    # What reads the language model's output late pulls at all of its layers but the head that reads words.
    decoder = [
        n
        for part, n, _ in named_parts(drill.model)
        if n in moved and part == "language_model" and ".layers." in n
    ]
    depth = len(drill.model.anatomy.decoder_layers(drill.model.hf))
    tap = getattr(make(name), "layer", None)
    assert {int(n.split(".layers.")[1].split(".")[0]) for n in decoder} == set(range(depth if tap in (None, -1) else tap))  # fmt: skip


class AtFit(Algorithm):
    """Copies of the base weights, the random state and the optimizer's groups when a fit begins."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def match(self, event: Any, state: Any) -> bool:
        return event.value == "fit_start"

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        model = getattr(state.model, "module", state.model)
        self.seen = {
            "base": {n: p.detach().clone() for n, p in model.net.hf.named_parameters()},
            "random": torch.get_rng_state(),
            "optimized": [id(p) for g in state.optimizers[0].param_groups for p in g["params"]],
            "heads": [id(p) for p in model.net.auxiliary.parameters() if p.requires_grad],
            "trained": [id(p) for p in model.net.hf.parameters() if p.requires_grad],
        }


@EACH
def test_its_head_leaves_weights_random_state_and_data_order_untouched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    found = []
    for subset in ([], [name]):
        spy = AtFit()
        monkeypatch.setattr(
            jobs, "_make", lambda n, k, stock=jobs._make, spy=spy: spy if n == "spy" else stock(n, k)
        )
        specs = [*settings.algorithms(subset)[:-1], ("spy", {})]
        samples = [*settings.mixed(1), *settings.mixed(11)]
        result = jobs.train(samples=samples, global_batch=4, steps=2, algorithms=specs, **settings.MODEL)
        monkeypatch.undo()
        found.append((spy.seen, result["uids"]))
    (plain, order), (named, same_order) = found
    assert all(torch.equal(v, named["base"][k]) for k, v in plain["base"].items())
    assert torch.equal(plain["random"], named["random"]) and order == same_order and len(order) == 2
    # Each head's parameters reach the optimizer exactly once, and nothing else is added or lost.
    assert sorted(named["optimized"]) == sorted(named["trained"] + named["heads"])
    assert bool(named["heads"]) == METHODS[name].head


@EACH
def test_it_says_what_it_is_and_its_state_goes_through_a_checkpoint(name: str) -> None:
    method = make(name)
    made = eval(repr(method), {type(method).__name__: type(method)})
    assert repr(made) == repr(method) and all(
        f"{k}={v!r}" in repr(method) for k, v in METHODS[name].arguments.items()
    )
    assert type(copy.deepcopy(method)) is type(method)
    state = method.state_dict()
    other = make(name)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert not method.is_off() and (make(name, **METHODS[name].off).is_off() or METHODS[name].spares)
