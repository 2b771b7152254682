"""What JARVIS's keywords may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...data.patch_targets import STORED
from ...models.errors import UserError, nearest
from .functional import LOSSES, WEIGHTINGS
from .heads import HEADS

TRAIN = ("proj", "proj+early", "all")
TEXT_LOSS = ("auto", "masked", "unmasked")
NTP_SCOPE = ("sample", "step")

SEEN_WHOLE = (
    "algorithms.jarvis.hide_unused: it hides patches from words, which see the whole image with text_loss: unmasked "
    "(what auto is where there are questions); set text_loss: masked"
)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse values that a keyword cannot have.

    Args:
        options: keyword of :class:`~opsin.algorithms.jarvis.JARVIS` -> value.

    Raises:
        UserError: the first of them, and what it may be.
    """
    weight, share, lr = options["weight"], options["ntp_probability"], options["lr"]
    layer, interval = options["layer"], options["log_interval"]
    for key, good, hint in (
        ("weight", _number(weight) and weight >= 0, "0 (off) or more"),
        ("ntp_probability", _number(share) and 0 <= share <= 1, "0 to 1"),
        ("lr", lr is None or (_number(lr) and lr > 0), "a rate above 0, or null for the run's"),
        ("layer", layer is None or (type(layer) is int and layer > 0), "1 .. N, or null for N // 4"),
        ("log_interval", type(interval) is int and interval > 0, "1 or more"),
    ):
        if not good:
            raise UserError(f"algorithms.jarvis.{key}: {options[key]}: use {hint}")
    for key, known in (
        ("head", HEADS), ("loss", LOSSES), ("weighting", WEIGHTINGS), ("text_loss", TEXT_LOSS), ("train", TRAIN),
        ("ntp_scope", NTP_SCOPE), ("stored", STORED),
    ):  # fmt: skip
        if options[key] not in known:
            raise UserError(
                f"algorithms.jarvis.{key} '{options[key]}': unknown{nearest(str(options[key]), known)}"
            )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
