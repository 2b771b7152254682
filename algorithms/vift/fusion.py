"""How strongly, where and which tokens are fused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...models.errors import UserError, nearest
from .functional import MODES

ALIGNMENTS = ("suffix", "paper_code")
"""``suffix``: the tokens that both prompts end with; ``paper_code``: as many as T has, its system prompt falling on M's
last image tokens."""


@dataclass(frozen=True)
class Fusion:
    """How strongly, where and which tokens are fused.

    Args:
        strength: g, shared by the layers of the window: each has a = g / layers. So it means the same at any depth,
            as far as layers add up. 0 with any ``ratio``: off. The released code's only literal, .025 at 14 layers, is .35.
        ratio: b / a, what is taken from the states with the picture; 0 needs one pass less.
        layers: [first, end) of the window; None: the upper half.
        weights: shares of the strength, one a layer of the window; None: equal ones.
        align: one of :data:`ALIGNMENTS`.
        mode: one of ``functional.MODES``.
        preserve_norm: keep the norm of every state.

    Raises:
        UserError: a value that makes no sense.
    """

    strength: float = 0.35
    ratio: float = 1.0
    layers: tuple[int, int] | None = None
    weights: tuple[float, ...] | None = None
    align: str = "suffix"
    mode: str = "add"
    preserve_norm: bool = False

    def __post_init__(self) -> None:
        for key, known in (("align", ALIGNMENTS), ("mode", MODES)):
            if getattr(self, key) not in known:
                raise UserError(
                    f"fusion.{key} '{getattr(self, key)}': unknown{nearest(str(getattr(self, key)), known)}"
                )
        for key in ("strength", "ratio"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
                raise UserError(f"fusion.{key}: {value}: use a number")
        for key, kind, hint in (
            ("layers", int, "[first, end) with 0 <= first < end"),
            ("weights", int | float, "a number for each layer of the window"),
        ):
            value = getattr(self, key)
            if value is None:
                continue
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise UserError(f"fusion.{key}: {value}: use {hint}")
            if not all(isinstance(v, kind) and not isinstance(v, bool) and math.isfinite(v) for v in value):
                raise UserError(f"fusion.{key}: {list(value)}: use {hint}")
            object.__setattr__(self, key, tuple(value))
        if self.layers is not None and (len(self.layers) != 2 or not 0 <= self.layers[0] < self.layers[1]):
            raise UserError(f"fusion.layers: {list(self.layers)}: use [first, end) with 0 <= first < end")
        if self.weights is not None and not sum(self.weights):
            raise UserError("fusion.weights: their sum is 0, so they are no shares")
        if not isinstance(self.preserve_norm, bool):
            raise UserError(f"fusion.preserve_norm: {self.preserve_norm}: use true or false")

    @property
    def off(self) -> bool:
        """Whether nothing would be changed."""
        return self.strength == 0

    def coefficients(self, layers: int) -> dict[int, tuple[float, float]]:
        """(a, b) of each layer of the window, for a decoder of so many layers.

        Raises:
            UserError: the window does not lie in the decoder.
        """
        first, end = self.layers or (layers // 2, layers)
        if end > layers:
            raise UserError(
                f"fusion.layers: [{first}, {end}): the language model has {layers} layers, 0 to {layers - 1}"
            )
        shares = self.weights or (1.0,) * (end - first)
        if len(shares) != end - first:
            raise UserError(
                f"fusion.weights: {len(shares)} for the {end - first} layers {first} to {end - 1}"
            )
        total = sum(shares)
        each = {first + i: self.strength * share / total for i, share in enumerate(shares)}
        return {layer: (a, a * self.ratio) for layer, a in each.items()}
