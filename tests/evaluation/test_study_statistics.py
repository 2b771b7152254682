"""Differences, effects, corrections and reach: golden values by hand, and what must not change anything."""

from __future__ import annotations

import math
from itertools import combinations, permutations, product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.evaluation.study import factorial
from opsin.evaluation.study.bootstrap import components, most, picture_draws, seed_draws
from opsin.evaluation.study.measures import Form
from opsin.evaluation.study.multiple import holm
from opsin.evaluation.study.over_seeds import over_seeds, paired, thinned
from opsin.evaluation.study.power import detectable, planned
from opsin.evaluation.study.resampled import Outcomes, Resampled, stack
from opsin.evaluation.study.student import quantile, two_sided

NONE = lambda records, scorer: np.zeros((0, 2))  # noqa: E731
SHARE, NATS = Form(NONE), Form(NONE, unit="nats", better=-1)


def outcomes(
    right: dict[str, list[list[float]]], form: Form = SHARE, same: np.ndarray | None = None
) -> Outcomes:
    """Cell -> seed -> picture -> outcome of its one question."""
    runs = {(cell, seed): None for cell, rows in right.items() for seed in range(len(rows))}
    values = np.array([row for rows in right.values() for row in rows], float)
    sums = np.stack([values, np.ones_like(values)], -1)
    return Outcomes(form, {key: at for at, key in enumerate(runs)}, sums, same)


@pytest.mark.parametrize(
    "df, t",
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (5, 2.5706),
        (10, 2.2281),
        (30, 2.0423),
        (120, 1.9799),
        (1e4, 1.9602),
    ],
)
def test_t_quantiles_are_those_of_the_tables(df: float, t: float) -> None:
    assert quantile(0.975, df) == pytest.approx(t, abs=1e-4)
    assert quantile(0.025, df) == -quantile(0.975, df)
    assert two_sided(t, df) == pytest.approx(0.05, abs=1e-5)


@pytest.mark.parametrize("df", [1.0, 2.0, 7.3, 400.0])
def test_t_tails_are_those_of_a_fine_sum(df: float) -> None:
    for t in (0.0, 0.4, 1.7, 4.0):
        x = np.linspace(-t, t, 200_001)
        log = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        inside = np.trapezoid(np.exp(log - (df + 1) / 2 * np.log1p(x**2 / df)), x) if t else 0.0
        assert two_sided(t, df) == pytest.approx(1 - inside, abs=1e-8)
    assert two_sided(math.inf, df) == 0
    assert two_sided(3.0, 1e6) == pytest.approx(2 * (1 - NormalDist().cdf(3)))


def test_a_small_study_by_hand() -> None:
    """Two seeds, four pictures. b: 2/4 and 3/4 right, a: 3/4 and 3/4; differences +.25 and 0."""
    found = Resampled(outcomes({"b": [[1, 1, 0, 0], [1, 1, 1, 0]], "a": [[1, 1, 1, 0], [1, 1, 0, 1]]}))
    level, gap = found.level("b"), found.difference("a", "b")
    assert level is not None and gap is not None
    assert level.value == pytest.approx(0.625)
    assert level.by_seed == pytest.approx((0.5, 0.75))
    assert (level.n, level.pictures, level.seeds) == (4, 4, (0, 1))
    assert gap.by_seed == pytest.approx((0.25, 0.0))
    assert gap.value == pytest.approx(0.125)
    # Table of differences [[0, 0, 1, 0], [0, 0, -1, 1]], grand mean 1/8: seeds' mean square 4 * 2 * (1/8)^2 / 1 = 1/8; picture
    # means 0, 0, 0, 1/2: 2 * (3/64 + 9/64) / 3 = 1/8; total sum of squares 3 - 8/64 = 23/8, rest (23/8 - 1/8 - 3/8) / 3 = 19/24.
    # Seeds and pictures vary less than the rest says they would: V = (19/24) / 8, with 3 degrees of freedom.
    assert gap.standard_error == pytest.approx(math.sqrt(19 / 24 / 8))
    assert gap.df == pytest.approx(3)
    assert gap.variance == pytest.approx({"seed": 0, "picture": 0, "rest": math.sqrt(19 / 24)})
    assert gap.p == pytest.approx(two_sided(0.125 / math.sqrt(19 / 192), 3), abs=1e-5)
    assert gap.low < 0.125 < gap.high and gap.clear == 0
    least = quantile(0.975, 3) * math.sqrt(19 / 192)
    assert least - 1e-9 <= 0.125 - gap.low < 1.4 * least and least - 1e-9 <= gap.high - 0.125 < 1.4 * least


def test_components_by_hand_where_seeds_and_pictures_matter() -> None:
    table = np.array([[0.0, 4.0, 8.0], [2.0, 6.0, 11.0]])
    grand = 31 / 6
    of_seeds = 3 * ((4 - grand) ** 2 + (19 / 3 - grand) ** 2)
    of_pictures = 2 * ((1 - grand) ** 2 + (5 - grand) ** 2 + (9.5 - grand) ** 2) / 2
    of_rest = (((table - grand) ** 2).sum() - of_seeds - 2 * of_pictures) / 2
    variance, df, parts = components(table)
    assert variance == pytest.approx((of_seeds + of_pictures - of_rest) / 6)
    assert df == pytest.approx(
        (of_seeds + of_pictures - of_rest) ** 2 / (of_seeds**2 / 1 + of_pictures**2 / 2 + of_rest**2 / 2)
    )
    assert parts["seed"] == pytest.approx(math.sqrt((of_seeds - of_rest) / 3))
    assert components(table[:1])[:2] == (
        pytest.approx(table[0].var(ddof=1) / 3),
        2,
    )  # one seed: pictures alone


def test_ratios_are_of_sums_and_not_means_of_ratios() -> None:
    sums = np.array([[[1.0, 1.0], [0.0, 9.0]], [[5.0, 5.0], [0.0, 5.0]]])
    found = Resampled(Outcomes(SHARE, {("b", 0): 0, ("a", 0): 1}, sums))
    assert found.level("b").value == pytest.approx(0.1)  # type: ignore[union-attr]
    assert found.difference("a", "b").value == pytest.approx(0.4)  # type: ignore[union-attr]
    harmonic = Form(NONE, None)
    assert harmonic.value(np.array([3.0, 4.0, 3.0, 6.0])) == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert harmonic.value(np.array([0.0, 0.0, 0.0, 6.0])) == 0
    assert np.isnan(SHARE.value(np.array([0.0, 0.0])))


def test_draws_are_seeds_and_pictures_with_repetition() -> None:
    draws = picture_draws(50, 400)
    assert (draws.sum(1) == 50).all()
    assert draws.var() == pytest.approx(1 - 1 / 50, rel=0.05)
    assert seed_draws(4, 300).sum(1) == pytest.approx(1)
    assert set(np.unique(seed_draws(2, 300))) == {0, 0.5, 1}
    assert picture_draws(50, 400) is draws


def test_questions_are_summed_by_picture() -> None:
    columns = np.array([[1.0, 1], [0, 1], [1, 1]])
    found = stack(SHARE, [(("b", 1), columns, np.array([1, 1, 0]))], 3)
    assert found.sums.tolist() == [[[1, 1], [1, 2], [0, 0]]]


def test_pictures_with_other_questions_are_left_out_of_a_comparison() -> None:
    same = np.array([[True, True, True], [True, True, False]])
    found = Resampled(outcomes({"b": [[1, 0, 0]], "a": [[1, 1, 1]]}, same=same))
    gap = found.difference("a", "b")
    assert gap is not None
    assert (gap.value, gap.pictures) == (pytest.approx(0.5), 2)
    assert found.level("b").pictures == 3  # type: ignore[union-attr]


TABLES = st.integers(1, 4).flatmap(
    lambda seeds: st.integers(2, 8).flatmap(
        lambda pictures: st.tuples(
            *[st.lists(st.lists(st.integers(0, 1), min_size=pictures, max_size=pictures), min_size=seeds, max_size=seeds)] * 2
        )
    )
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(TABLES)
def test_what_is_identical_differs_by_nothing_within_nothing(
    tables: tuple[list[list[float]], list[list[float]]],
) -> None:
    gap = Resampled(outcomes({"b": tables[0], "a": tables[0]}), 50).difference("a", "b")
    assert gap is not None
    assert (gap.value, gap.low, gap.high, gap.p, gap.clear) == (0, 0, 0, 1, 0)


@settings(max_examples=40, deadline=None)
@given(TABLES, st.randoms(use_true_random=False))
def test_the_order_of_cells_and_seeds_changes_nothing(
    tables: tuple[list[list[float]], list[list[float]]], random: object
) -> None:
    cells = {"b": tables[0], "a": tables[1]}
    one = outcomes(cells)
    keys = list(one.runs)
    random.shuffle(keys)  # type: ignore[attr-defined]
    rows = [one.runs[key] for key in keys]
    other = Outcomes(SHARE, {key: at for at, key in enumerate(keys)}, one.sums[rows])
    first, second = (Resampled(o, 50).difference("a", "b") for o in (one, other))
    assert first is not None and second is not None
    assert [second.value, second.low, second.high] == pytest.approx(
        [first.value, first.low, first.high], abs=1e-12
    )
    back = Resampled(one, 50).difference("b", "a")
    assert back is not None and first.value == pytest.approx(-back.value)


@settings(max_examples=30, deadline=None)
@given(TABLES, st.floats(-5, 5))
def test_a_constant_moves_a_difference_and_leaves_its_width(
    tables: tuple[list[list[float]], list[list[float]]], constant: float
) -> None:
    b, a = (np.array(t, float) for t in tables)
    one = Resampled(outcomes({"b": b.tolist(), "a": a.tolist()}, NATS), 50).difference("a", "b")
    other = Resampled(outcomes({"b": b.tolist(), "a": (a + constant).tolist()}, NATS), 50).difference(
        "a", "b"
    )
    assert one is not None and other is not None
    assert other.value == pytest.approx(one.value + constant, abs=1e-9)
    assert [other.low, other.high] == pytest.approx([one.low + constant, one.high + constant], abs=1e-5)
    both = Resampled(
        outcomes({"b": (b + constant).tolist(), "a": (a + constant).tolist()}, NATS), 50
    ).difference("a", "b")
    assert both is not None and both.value == pytest.approx(one.value, abs=1e-9)


@pytest.mark.parametrize("factors", [("x", "y"), ("x", "y", "z")])
def test_effects_are_the_coefficients_of_a_regression(factors: tuple[str, ...]) -> None:
    rng = np.random.default_rng(3)
    on = [frozenset(c) for r in range(len(factors) + 1) for c in combinations(factors, r)]
    cells = {one: "+".join(sorted(one)) or "none" for one in on}
    answers = {cells[one]: rng.integers(0, 2, (4, 30)).astype(float).tolist() for one in on}
    found = Resampled(outcomes(answers), 50)
    rows, y = [], []
    for one, seed, picture in product(on, range(4), range(30)):
        code = {f: 0.5 if f in one else -0.5 for f in factors}
        rows.append([1.0, *(math.prod(code[f] for f in effect) for effect in factorial.effects(factors))])
        y.append(answers[cells[one]][seed][picture])
    fitted = np.linalg.lstsq(np.array(rows), np.array(y), rcond=None)[0][1:]
    for effect, coefficient in zip(factorial.effects(factors), fitted, strict=True):
        told = found.contrast(factorial.contrast(factors, effect, cells))
        assert told is not None and told.value == pytest.approx(coefficient)
        assert told.low < coefficient < told.high
    assert len(fitted) == 2 ** len(factors) - 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_is_that_of_a_loop(p: list[float]) -> None:
    expected = [0.0] * len(p)
    worst = 0.0
    for rank, at in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, p[at] * (len(p) - rank))
        expected[at] = min(1.0, worst)
    assert holm(p) == pytest.approx(expected)
    for order in list(permutations(range(len(p))))[:3]:
        assert holm([p[i] for i in order]) == pytest.approx([expected[i] for i in order])


def test_holm_of_a_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_smallest_effect_is_found_four_times_in_five() -> None:
    """Studies that are drawn with just the planned effect find it as often as planned."""
    reach = planned(6, 200, seed_sd=0.03, disagreement=0.2)
    rng, found = np.random.default_rng(2), 0
    rest = math.sqrt(0.2)
    for _ in range(600):
        table = reach.effect + rng.normal(0, 0.03, (6, 1)) + rng.normal(0, rest, (6, 200))
        variance, df, _ = components(table)
        found += table.mean() / math.sqrt(variance) > quantile(0.975, round(min(df, most(6)), 3))
    assert 0.75 < found / 600 < 0.87
    assert reach.half_width == pytest.approx(quantile(0.975, round(reach.df, 3)) * reach.standard_error)
    assert planned(12, 200, seed_sd=0.03, disagreement=0.2).effect < reach.effect
    alone = planned(1, 1000, seed_sd=0.5, disagreement=0.2)  # one seed: over pictures only
    assert alone.standard_error == pytest.approx(math.sqrt(0.2 / 1000))
    assert detectable(0.01, 1e6).effect == pytest.approx(0.01 * (1.959964 + 0.841621), abs=1e-6)
    with pytest.raises(ValueError, match="one of disagreement and rest_sd"):
        planned(6, 200, seed_sd=0.1)


def test_numbers_of_which_a_run_has_one_have_intervals_over_seeds() -> None:
    told = over_seeds({17: 1.0, 18: 2.0, 19: 3.0})
    assert (told["value"], told["spread"], told["over"]) == (2.0, 1.0, "seeds")
    half = 4.302653 / math.sqrt(3)
    assert (told["low"], told["high"]) == (
        pytest.approx(2 - half, abs=1e-4),
        pytest.approx(2 + half, abs=1e-4),
    )
    one = over_seeds({17: 1.0}, {17: 0.5})
    assert (one["over"], one["low"]) == ("pictures", pytest.approx(1 - 1.96 * 0.5, abs=1e-3))
    assert over_seeds({17: 1.0})["low"] is None and over_seeds({})["value"] is None
    assert paired({17: 2.0, 18: 4.0}, {17: 1.0, 18: 2.0, 19: 9.0}, ratio=True)["value"] == 2.0
    assert paired({17: 2.0, 18: 4.0}, {17: 1.0, 18: 2.0})["by_seed"] == [1.0, 2.0]
    curve = thinned([(float(x), 2.0 * x) for x in range(1000)], 10)
    assert len(curve) == 10 and curve[0] == (49.5, 99.0)
