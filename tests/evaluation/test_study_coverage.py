"""Do 95 % intervals hold the truth in 95 % of studies? Five hundred simulated ones, of few seeds and of many."""

from __future__ import annotations

import numpy as np
import pytest

from opsin.evaluation.study.bootstrap import percentile
from opsin.evaluation.study.measures import Form
from opsin.evaluation.study.resampled import Outcomes, Resampled

STUDIES = 500
SHARE = Form(lambda records, scorer: np.zeros((0, 2)))


def squashed(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class World:
    """Right and wrong answers: pictures differ in how hard they are, and in what the method does for them; seeds in skill.

    Args:
        seeds, pictures: drawn for each study.
        seed_sd, picture_sd: of skill between seeds, and of the method's effect between pictures (logits).
        mentions: each picture has so many mentions on average (CHAIR-like ratio); None: one question.
    """

    def __init__(
        self, seeds: int, pictures: int, seed_sd: float, picture_sd: float, mentions: float | None = None
    ):
        self.seeds, self.pictures = seeds, pictures
        self.seed_sd, self.picture_sd, self.mentions = seed_sd, picture_sd, mentions
        rng = np.random.default_rng(0)
        truth = self._chances(rng, 1, 400_000)
        if seeds > 1:
            truth = np.concatenate([self._chances(rng, 1, 2000) for _ in range(400)], 2)
        self.truth = float((truth[1] - truth[0]).mean())

    def _chances(self, rng: np.random.Generator, seeds: int, pictures: int) -> np.ndarray:
        """(2, S, U) chance of a right answer, without and with the method."""
        hard, gain = rng.normal(0, 1, pictures), 0.3 + rng.normal(0, self.picture_sd, pictures)
        skill = rng.normal(0, self.seed_sd, (2, seeds, 1)) if self.seeds > 1 else np.zeros((2, seeds, 1))
        return squashed(0.3 + hard + np.stack([0 * gain, gain])[:, None] + skill)

    def study(self, rng: np.random.Generator) -> Resampled:
        p = self._chances(rng, self.seeds, self.pictures)
        whole = np.ones(p.shape, int) if self.mentions is None else rng.poisson(self.mentions, p.shape)
        sums = np.stack([rng.binomial(whole, p), whole], -1).astype(float).reshape(-1, self.pictures, 2)
        runs = {(cell, s): at * self.seeds + s for at, cell in enumerate("bc") for s in range(self.seeds)}
        return Resampled(Outcomes(SHARE, runs, sums), 400)


WORLDS = {
    "six seeds": (6, 150, 0.2, 0.3),
    "six seeds that matter most": (6, 150, 0.5, 0.0),
    "three seeds": (3, 150, 0.3, 0.3),
    "three seeds that matter most": (3, 150, 0.6, 0.0),
    "one seed: over pictures alone": (1, 150, 0.0, 0.3),
    "a ratio of sums": (6, 150, 0.2, 0.3, 3.0),
    "six seeds that do not differ": (6, 150, 0.0, 0.3),
    "two seeds that matter most": (2, 150, 0.6, 0.0),
}
SAFE = "six seeds that do not differ"
"""Where seeds do not matter, what few of them seem to matter is still paid for: wider than needed."""
SHORT = "two seeds that matter most"
"""The one degree of freedom of two seeds cannot tell how much they differ: less than 95 %, and said so in the docs."""


def simulated(name: str) -> tuple[float, float]:
    """Share of studies whose interval holds the truth, and the same of plain percentile intervals."""
    world = World(*WORLDS[name])
    rng = np.random.default_rng(1)
    held = plain = 0
    for _ in range(STUDIES):
        study = world.study(rng)
        found = study.difference("c", "b")
        assert found is not None and found.low is not None and found.high is not None
        held += found.low <= world.truth <= found.high
        gaps = study.drawn[:, world.seeds :] - study.drawn[:, : world.seeds]
        low, high = percentile(np.array(found.by_seed), gaps)
        plain += low <= world.truth <= high
    return held / STUDIES, plain / STUDIES


@pytest.mark.parametrize("name", WORLDS)
def test_intervals_hold_the_truth_in_95_of_100_studies(name: str) -> None:
    held, plain = simulated(name)
    assert (0.88 if name == SHORT else 0.92) <= held <= (0.99 if name == SAFE else 0.98), (held, plain)
    if name in ("three seeds that matter most", SHORT):  # why plain percentiles will not do
        assert plain < 0.88 < held
