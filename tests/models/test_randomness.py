"""Keyed random numbers: a function of the key alone, well spread, and unrelated to their neighbours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.models.randomness import keys, keys_of_views, mix, normal, uniform, view_keys

INT64 = st.integers(-(2**63), 2**63 - 1)


def _splitmix(seed: int, count: int) -> list[int]:
    """SplitMix64 as published, in Python's own integers."""
    whole, out, state = 2**64 - 1, [], seed & (2**64 - 1)
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & whole
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
        out.append(z ^ (z >> 31))
    return out


@settings(max_examples=50, deadline=None)
@given(seed=INT64)
def test_a_keys_stream_is_that_of_splitmix64(seed: int) -> None:
    assert _splitmix(0, 1) == [0xE220A8397B1DCDAF]  # the published first output
    got = uniform(torch.tensor(seed), 5)
    assert got.dtype == torch.float64
    assert got.tolist() == [(z >> 11) * 2.0**-53 for z in _splitmix(seed, 5)]


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(INT64, min_size=1, max_size=4), other=INT64, place=st.integers(0, 3))
def test_a_key_depends_on_every_part_and_on_their_order(parts: list[int], other: int, place: int) -> None:
    key = keys(*parts)
    assert torch.equal(key, keys(*map(torch.tensor, parts)))
    changed = list(parts)
    changed[place % len(parts)] = other
    assert (int(key) == int(keys(*changed))) == (changed == parts)
    if parts != parts[::-1]:
        assert int(key) != int(keys(*parts[::-1]))
    assert int(keys(*parts, 0)) != int(key)


def test_keys_broadcast_and_no_two_of_many_are_alike() -> None:
    uid, image, draw = torch.arange(200)[:, None, None], torch.arange(10)[:, None], torch.arange(8)
    key = keys(3, uid, image, draw)
    assert key.shape == (200, 10, 8) and len(key.unique()) == key.numel()
    assert int(key[7, 3, 2]) == int(keys(3, 7, 3, 2))
    assert not set(keys(4, uid, image, draw).flatten().tolist()) & set(key.flatten().tolist())
    assert len(mix(torch.arange(-5000, 5000)).unique()) == 10_000  # a bijection


def test_one_number_depends_on_its_key_and_counter_alone() -> None:
    key = keys(1, torch.arange(50))
    whole = normal(key, 64)
    assert whole.dtype == torch.float32 and torch.equal(normal(key[13:14], 64)[0], whole[13])
    assert torch.equal(normal(key, 7), whole[:, :7])
    assert torch.equal(normal(key[:, None], torch.tensor([5, 60])), whole[:, [5, 60]])
    torch.manual_seed(99)
    assert torch.equal(normal(key, 64), whole)
    before = torch.get_rng_state()
    uniform(key, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_normal_numbers_are_normal() -> None:
    x = normal(keys(5, torch.arange(1000)), 1000).double()
    assert bool(x.isfinite().all()) and 4.5 < float(x.abs().max()) < 6
    moments = [float((x**n).mean()) for n in (1, 2, 3, 4, 6)]
    for moment, wanted, error in zip(
        moments, (0, 1, 0, 3, 15), (0.001, 0.0014, 0.004, 0.01, 0.1), strict=True
    ):
        assert abs(moment - wanted) < 4 * error
    grid = torch.linspace(-3, 3, 25)
    share = torch.bucketize(x.flatten(), grid.double()).bincount(minlength=26).cumsum(0)[:-1] / x.numel()
    assert float((share - torch.special.ndtr(grid.double())).abs().max()) < 0.002  # 4 standard errors
    # Means of each key, and of each counter, are as far from zero as chance puts them.
    for axis in (0, 1):
        assert float((x.mean(axis) * 1000**0.5).std()) == pytest.approx(1, abs=0.1)


def test_uniform_numbers_are_uniform() -> None:
    x = uniform(keys(5, torch.arange(500)), 1000)
    assert float(x.min()) >= 0 and float(x.max()) < 1
    count = (x * 100).long().flatten().bincount(minlength=100).double()
    assert float(((count - 5000) ** 2 / 5000).sum()) < 99 + 5 * (2 * 99) ** 0.5


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).mean())


@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbours_are_unrelated(lag: int) -> None:
    """Keys, draws and counters that differ by little: each mean of 10^6 products is N(0, 10^-3)."""
    x = normal(keys(1, torch.arange(1000)), 1000)
    assert abs(_correlation(x[:, :-lag], x[:, lag:])) < 0.005
    assert abs(_correlation(x[:-lag], x[lag:])) < 0.005
    assert abs(_correlation(x[:-lag, lag:], x[lag:, :-lag])) < 0.005
    assert abs(_correlation(x.square()[:, :-lag] - 1, x.square()[:, lag:] - 1)) < 0.012
    for other in (keys(1 + lag, torch.arange(1000)), keys(1, torch.arange(1000) * lag + 2**40), keys(1, torch.arange(1000), lag)):  # fmt: skip
        assert abs(_correlation(x, normal(other, 1000))) < 0.005


def test_the_parts_of_one_bit_pattern_are_unrelated() -> None:
    """Uniform and normal of one counter share their bits; a user of both must take keys of its own."""
    key = keys(2, torch.arange(1000))
    u, n = uniform(keys(key, 1), 1000).float() - 0.5, normal(keys(key, 2), 1000)
    assert abs(_correlation(u, n)) < 0.002 and abs(_correlation(u.abs() - 0.25, n.square() - 1)) < 0.002


def test_keys_lie_where_their_tensors_lie_and_numbers_cost_no_transfer() -> None:
    """On the meta device nothing can be copied to the host: what touches it stops."""
    uid = torch.arange(3, device="meta")
    for key in (keys(uid, 1), keys(1, uid), keys(1, 2, uid, 3, uid[:, None])):
        assert key.device.type == "meta"
        assert normal(key, 4).device.type == uniform(key, 4).device.type == "meta"
    here = torch.arange(3)
    assert torch.equal(keys(5, 7, here), keys(torch.tensor(5), torch.tensor(7), here))
    assert int(keys(5, 7)) == int(keys(torch.tensor(5), torch.tensor(7)))


def test_a_view_has_one_key_wherever_its_document_lies() -> None:
    """Second view of the second picture of sample 7, alone in a row or packed behind others."""

    def batch(row: list[int], document: list[int], uid: list[list[int]], image: list[int]) -> dict:
        named = {"view_row": row, "view_document": document, "document_uid": uid, "view_image": image}
        found = {name: torch.tensor(values) for name, values in named.items()}
        return {**found, "document_visit": torch.full_like(found["document_uid"], 3)}

    alone = keys_of_views(11, batch([0, 0, 0], [0, 0, 0], [[7]], [0, 1, 1]))
    packed = keys_of_views(11, batch([0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [[5, 6], [4, 7]], [0, 0, 0, 1, 1]))
    assert torch.equal(packed[2:], alone)
    assert len(set(packed.tolist())) == 5
    # the same sample twice in a batch: both begin at their first view
    twice = keys_of_views(11, batch([0, 0], [0, 1], [[7, 7]], [0, 0]))
    assert twice.tolist() == [int(alone[0])] * 2
    assert torch.equal(alone, keys(11, 7, 3, torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])))
    empty = torch.empty(0, dtype=torch.int64)
    assert view_keys(1, empty, empty, empty, empty).shape == (0,)
