"""The questions of a stored sample, for everything that scores without encoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.chat import BadConversation, exchanges
from ..data.schema import IMAGE_MARK

UNNAMED = "all"
"""Kind of a question whose sample names none: it counts in the total alone."""


def kinds_of(sample: Mapping[str, Any], count: int) -> list[str]:
    """Kinds of the first ``count`` questions of a sample (``meta.kinds``).

    Raises:
        BadConversation: there are kinds, but not one a question.
    """
    meta = sample.get("meta")
    kinds = meta.get("kinds") if isinstance(meta, Mapping) else None
    if not kinds:
        return [UNNAMED] * count
    asked = len(sample["conversations"]) // 2  # a system turn makes the number odd
    if not isinstance(kinds, list | tuple) or len(kinds) != asked:
        named = len(kinds) if isinstance(kinds, list | tuple) else type(kinds).__name__
        raise BadConversation(f"meta.kinds should name {asked} kinds, one a question; found {named}")
    return [str(kind) for kind in kinds[:count]]


def questions(sample: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(question without image marks, answer, kind) of each exchange.

    Raises:
        BadConversation: the sample is no conversation, or its kinds do not fit it.
    """
    _, pairs = exchanges(sample["conversations"])
    return [
        (user.replace(IMAGE_MARK, "").strip(), answer.strip(), kind)
        for (user, answer), kind in zip(pairs, kinds_of(sample, len(pairs)), strict=True)
    ]
