"""Guesses at hidden features: each against what it is by definition."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from opsin.algorithms.jarvis import JARVIS
from opsin.evaluation.hidden_features import (
    ROWS,
    Guesses,
    Ridge,
    Seen,
    _score,
    look,
    measure,
    nearest_context,
)
from opsin.models.errors import UserError

import methods
import zoo

TOWER = {"name": "tower", "path": "scenes"}


def test_nearest_context_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.rand(5, 6 * 7, generator=generator) < 0.2
    context[:, 3] = True
    found = nearest_context(context, (6, 7))
    for n in range(5):
        for p in range(42):
            away = [
                ((p // 7 - k // 7) ** 2 + (p % 7 - k % 7) ** 2, k) for k in range(42) if bool(context[n, k])
            ]
            assert int(found[n, p]) == min(away)[1]


def test_ridge_finds_a_linear_map_and_its_intercept_around_the_means() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, dtype=torch.float64, generator=generator)
    w, b = torch.randn(5, 3, generator=generator).double(), torch.randn(3, generator=generator).double()
    mean = 10 * torch.randn(7, 3, generator=generator)
    place = torch.randint(7, (400,), generator=generator)
    ridge = Ridge(7, 5, 3)
    for at in torch.arange(400).split(100):
        ridge.add(x[at], x[at] @ w + b + mean[place[at]], place[at])
    assert torch.allclose(ridge.solve(mean)(x).double(), x @ w + b, atol=0.02)


def _seen(feature: torch.Tensor, predicted: torch.Tensor, token: torch.Tensor) -> Seen:
    hidden = torch.zeros(feature.shape[:2], dtype=torch.bool)
    hidden[:, ::2] = True
    return Seen(token, feature, predicted, hidden, ~hidden)


def test_rows_are_what_they_say() -> None:
    """A perfect prediction scores 1 and a sign-flipped one -1; the mean 0; a linear map of the token is found."""
    generator = torch.Generator().manual_seed(1)
    token = torch.randn(64, 16, 6, generator=generator)
    feature = F.normalize(token @ torch.randn(6, 6, generator=generator) + 3.0, dim=-1)
    guesses = Guesses((4, 4))
    seen = _seen(feature, feature, token)
    guesses.add(seen)
    guesses.finish()
    scores = {row: values.mean() for row, (values, _) in _score(seen, guesses).items()}
    assert set(scores) == set(ROWS)
    assert scores["jarvis"] == pytest.approx(1, abs=1e-5)
    assert scores["mean"] == 0
    assert scores["linear_token"] > 0.8 > 0.3 > abs(scores["linear_context"])
    assert (
        abs(scores["another"]) < 0.2 and abs(scores["nearest"]) < 0.2
    )  # patches of random tokens tell nothing
    mean = feature.mean(0)
    flipped = _seen(feature, 2 * mean - feature, token)
    assert _score(flipped, guesses)["jarvis"][0].mean() == pytest.approx(-1, abs=1e-5)


def test_within_takes_the_pictures_own_mean_away() -> None:
    """What is said of the picture as a whole counts for the plain cosine and not within it."""
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(64, 1, 6, generator=generator).expand(-1, 16, -1)
    own = 0.1 * torch.randn(64, 16, 6, generator=generator)
    seen = _seen(whole + own, whole + 0.1 * torch.randn(64, 16, 6, generator=generator), whole + own)
    guesses = Guesses((4, 4))
    guesses.add(seen)
    guesses.finish()
    plain, within = _score(seen, guesses)["jarvis"]
    assert plain.mean() > 0.95
    assert abs(within.mean()) < 0.15


@pytest.mark.parametrize("text_loss", ["masked", "unmasked"])
def test_what_is_looked_at_is_the_model_itself(text_loss: str) -> None:
    """Predictions, tokens and masks of ``look`` are those that the method has in a step with the same masks."""
    jarvis = JARVIS(target=TOWER, text_loss=text_loss, ntp_probability=0.5)
    bench = methods.Bench(jarvis, size=32, bidirectional=True)
    bench.model.eval()
    batch = bench.batch([zoo.sample(i, size=(32, 32)) for i in range(4)])
    seen = look(bench.model, jarvis, dict(batch), predict=True)
    assert seen.token.shape == (4, 64, 32) and seen.feature.shape[:2] == (4, 64)
    assert bool((seen.hidden.sum(1) > 0).all()) and not bool((seen.hidden & seen.context).any())
    assert seen.predicted is not None
    assert not bool(seen.predicted[~seen.hidden].any())
    length = seen.predicted[seen.hidden].norm(dim=-1)
    assert torch.allclose(length, torch.ones_like(length), atol=1e-5)
    tokens = bench.model.anatomy.image_features(bench.model.hf, {"pixel_values": batch["pixel_values"]})
    assert torch.allclose(tokens.view(4, 64, -1), seen.token, atol=1e-5)


def test_views_of_several_grids_are_refused() -> None:
    jarvis = JARVIS(target=TOWER)
    bench = methods.Bench(jarvis, "llava_next", size=32, max_seq_len=800)
    batch = bench.batch([zoo.sample(0, size=(64, 32))])
    with pytest.raises(UserError, match=r"one and the same grid.*got 4?8x"):
        look(bench.model, jarvis, dict(batch), predict=False)
    with pytest.raises(UserError, match="no pictures to fit on"):
        measure(bench.model, jarvis, [], [])


def test_the_table_is_about_pictures() -> None:
    jarvis = JARVIS(target=TOWER)
    bench = methods.Bench(jarvis, size=32, bidirectional=True)
    bench.model.eval()
    batches = [bench.batch([zoo.sample(8 * b + i, size=(32, 32)) for i in range(8)]) for b in range(3)]
    found = measure(bench.model, jarvis, batches[:2], batches[2:])
    record = found.as_dict()
    assert record["pictures"] == 8 and record["fitted_on"] == 16 and list(record["rows"]) == list(ROWS)
    assert all(np.isfinite(v["within"]["mean"]) for v in record["rows"].values())
    again = measure(bench.model, jarvis, batches[:2], batches[2:])
    assert SimpleNamespace(**again.as_dict()) == SimpleNamespace(**record)
