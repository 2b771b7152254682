"""What ``train`` has and ``uniform`` has not: prior colours, held-out pairs, companion shapes."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..schema import stable_hash
from .config import COLOURS, SHAPES, SceneConfig


@dataclass(frozen=True)
class World:
    """Which colours, pairs and shapes ``train`` prefers.

    Attributes:
        prior: shape -> its prior colour; all different.
        held_out: (colour, shape) pairs that never occur in ``train``; never a prior pair.
        companion: shape -> the shape that often stands in the same scene.
    """

    prior: dict[str, str]
    held_out: frozenset[tuple[str, str]]
    companion: dict[str, str]

    def prior_shape(self, colour: str) -> str | None:
        """Shape whose prior colour this is, or None."""
        return next((s for s, c in self.prior.items() if c == colour), None)

    @cached_property
    def surprising(self) -> dict[str, list[str]]:
        """Shape -> the colours that ``train`` shows on it, except the prior one."""
        return {
            shape: [c for c in COLOURS if c != prior and (c, shape) not in self.held_out]
            for shape, prior in self.prior.items()
        }


@lru_cache(64)
def build_world(world: int, held_out: int) -> World:
    """World number ``world`` with ``held_out`` pairs: at most two a shape and one a colour."""
    rng = random.Random(stable_hash("scenes", "world", world))
    prior: dict[str, str] = dict(zip(SHAPES, rng.sample(COLOURS, len(SHAPES)), strict=True))
    ring = rng.sample(SHAPES, len(SHAPES))
    companion: dict[str, str] = {s: ring[(i + 1) % len(ring)] for i, s in enumerate(ring)}
    while True:  # one draw in a few puts no shape on its own prior colour
        colours = rng.sample(COLOURS, len(COLOURS))
        pairs: list[tuple[str, str]] = [(c, SHAPES[i % len(SHAPES)]) for i, c in enumerate(colours)]
        if all(prior[shape] != colour for colour, shape in pairs):
            return World(prior, frozenset(pairs[:held_out]), companion)


class Law:
    """How the attributes of a scene's objects are drawn, one object after the other."""

    skewed: bool
    """Whether P(colour | shape) is to be met exactly, so that no question may bend the colours."""

    most: float
    """The largest :meth:`chance` of all pairs, below 1."""

    def shape(self, rng: random.Random, before: str | None) -> str:
        """Draw a shape; ``before`` is that of the object drawn before, if any."""
        raise NotImplementedError

    def colour(self, rng: random.Random, shape: str) -> str:
        """Draw a colour for ``shape``."""
        raise NotImplementedError

    def chance(self, colour: str, shape: str) -> float:
        """Probability that an object is of this colour and shape."""
        raise NotImplementedError


class UniformLaw(Law):
    """Every (colour, shape) pair is as likely as any other, held-out pairs included."""

    skewed = False
    most = 1 / (len(COLOURS) * len(SHAPES))

    def shape(self, rng: random.Random, before: str | None) -> str:
        """Draw one of four, whatever stood before."""
        return rng.choice(SHAPES)

    def colour(self, rng: random.Random, shape: str) -> str:
        """Draw one of eight, whatever the shape."""
        return rng.choice(COLOURS)

    def chance(self, colour: str, shape: str) -> float:
        """The same for all 32 pairs."""
        return self.most


class TrainLaw(Law):
    """P(prior colour | shape) = skew, no held-out pair, companion shapes together."""

    skewed = True

    def __init__(self, config: SceneConfig) -> None:
        self.world = build_world(config.world, config.held_out)
        self.skew = config.skew
        self.companions = config.companions
        self.most = max(self.chance(c, s) for c in COLOURS for s in SHAPES)

    def shape(self, rng: random.Random, before: str | None) -> str:
        """Draw the companion of ``before`` with probability ``companions``, else one of four."""
        if before is not None and rng.random() < self.companions:
            return self.world.companion[before]
        return rng.choice(SHAPES)

    def colour(self, rng: random.Random, shape: str) -> str:
        """Draw the prior colour with probability ``skew``, else one of the shape's other colours."""
        if rng.random() < self.skew:
            return self.world.prior[shape]
        return rng.choice(self.world.surprising[shape])

    def chance(self, colour: str, shape: str) -> float:
        """Large for a prior pair, nothing for a held-out one."""
        if colour == self.world.prior[shape]:
            given = self.skew
        elif (colour, shape) in self.world.held_out:
            given = 0.0
        else:
            given = (1 - self.skew) / len(self.world.surprising[shape])
        return given / len(SHAPES)


@lru_cache(64)
def train_law(config: SceneConfig) -> TrainLaw:
    """The law of ``train``, kept for each configuration."""
    return TrainLaw(config)
