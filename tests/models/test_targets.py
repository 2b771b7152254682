"""What targets of all methods share: folding, identities, and how one is built by name."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.models.errors import UserError
from opsin.models.targets import Target, check_target, make_target
from opsin.models.targets.base import fold, unfold, weights_id
from opsin.models.targets.frozen import choice, whole

# Folding -------------------------------------------------------------------------------------------------


def test_a_token_is_its_window_of_latents_channel_first() -> None:
    z = torch.randn(2, 5, 6, 8)
    tokens = fold(z, 2).reshape(2, 3, 4, 20)
    for r in range(3):
        for c in range(4):
            window = z[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
            assert torch.equal(tokens[:, r, c], window.reshape(2, 20))
            assert torch.equal(tokens[:, r, c, 3 * 4 + 1 * 2 + 0], z[:, 3, 2 * r + 1, 2 * c])


@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 4)] * 5)
def test_unfold_undoes_fold(batch: int, channels: int, rows: int, columns: int, by: int) -> None:
    z = torch.randn(batch, channels, rows * by, columns * by)
    tokens = fold(z, by)
    assert tokens.shape == (batch, rows * columns, channels * by * by)
    assert torch.equal(unfold(tokens, (rows, columns), by), z)


def test_weights_are_told_apart_by_value_name_and_shape() -> None:
    net = torch.nn.BatchNorm2d(2)  # its counter has no dimension
    before = weights_id(net)
    assert weights_id(torch.nn.BatchNorm2d(2)) == before
    net.running_mean += 1  # type: ignore[operator]
    assert weights_id(net) != before
    assert weights_id(torch.nn.Linear(2, 3, bias=False)) != weights_id(torch.nn.Linear(3, 2, bias=False))


# By name -------------------------------------------------------------------------------------------------


class Brightness(Target):
    """Sums a picture's colours; says what it was given."""

    dim = moments_dim = 1
    cell = 2

    def __init__(self, scale: Any = 1, mode: str = "sum"):
        self.scale, self.mode = whole("scale", scale), choice("mode", mode, ("sum", "mean"))
        if scale == 13:
            raise UserError("no prefix here")
        if scale == 14:
            raise UserError("targets of 14")
        if scale == 15:
            raise ValueError("a library's own\nwords")
        self.seen: list[tuple] = []

    @property
    def identity(self) -> str:
        return f"brightness {self.scale}"

    def encode(self, pictures: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        self.seen.append((tuple(pictures.shape), grid))
        return fold(pictures, 2).sum(-1, keepdim=True)


KINDS = {"brightness": "toy_targets:Brightness"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "toy_targets", cast(Any, SimpleNamespace(Brightness=Brightness)))


@pytest.mark.parametrize("where", ["algorithms.jarvis.target", "--target"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("brihtness", "{}: unknown target 'brihtness'; did you mean 'brightness'?"),
        ({"name": "x"}, "{}.name: unknown target 'x'; known: brightness"),
        ({"nam": "brightness"}, "{}.name: unknown target 'None'"),
        (3, "{}: 3: use a name or a mapping with a name"),
        ({"name": "brightness", "scal": 2}, "{}.scal: unknown key; did you mean 'scale'?"),
        ({"name": "brightness", "scale": 0}, "{}.scale: a whole number of at least 1, got 0"),
        ({"name": "brightness", "mode": "su"}, "{}.mode: unknown 'su'; did you mean 'sum'?"),
        ({"name": "brightness", "scale": 13}, "no prefix here"),
        ({"name": "brightness", "scale": 14}, "targets of 14"),
        ({"name": "brightness", "scale": 15}, "{}: ValueError: a library's own ({{'scale': 15}})"),
    ],
)
def test_mistakes_begin_with_the_callers_place(spec: Any, message: str, where: str) -> None:
    with pytest.raises(UserError) as raised:
        make_target(spec, KINDS, where)
    assert str(raised.value).startswith(message.format(where)) and "\n" not in str(raised.value)


def test_a_target_is_looked_up_without_being_built() -> None:
    make, keywords = check_target({"name": "brightness", "scale": 0}, KINDS, "target")
    assert make.__name__ == "Brightness" and keywords == {"scale": 0}
    assert check_target("brightness", KINDS, "target")[1] == {}


def test_a_target_is_told_the_grid() -> None:
    target: Any = make_target("brightness", KINDS, "target")
    target.moments([torch.rand(3, 9, 9), torch.rand(3, 4, 6), torch.rand(3, 9, 9)], [(2, 3), (2, 3), (2, 3)])
    assert target.seen == [((2, 3, 4, 6), (2, 3)), ((1, 3, 4, 6), (2, 3))]
