"""Which choice a prediction that ranks its choices by log-likelihood stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...models.errors import UserError

RANKS = ("sum", "token")
"""How choices are compared: by the sum of the answer's log-likelihood (nats), or by its mean a token."""


def likeliest(record: Mapping[str, Any], rank: str = "sum") -> str | None:
    """The likeliest of the choices in ``record["logprobs"]``.

    The sum is the log-likelihood itself; it favours short answers where choices differ in length. The mean a token
    does not, but is no likelihood. For letters, and for yes and no, both are the same.

    Args:
        record: a prediction with ``logprobs``: choice -> ``{"sum": nats, "tokens": number of tokens}``.
        rank: one of ``RANKS``.

    Returns:
        None where several choices are equally likely: their order must not decide.

    Raises:
        UserError: a value that is no log-likelihood, or choices without one.
    """
    found = record["logprobs"]
    choices = record.get("choices") or list(found)
    if not isinstance(found, Mapping) or set(found) != set(choices):
        raise UserError(f"{_where(record)}: logprobs should name the choices, {sorted(set(choices))}")
    values = {choice: _value(record, choice, one, rank) for choice, one in found.items()}
    best = max(values.values())
    first = [choice for choice, value in values.items() if value == best]
    return first[0] if len(first) == 1 else None


def _value(record: Mapping[str, Any], choice: str, one: Any, rank: str) -> float:
    nats = one.get("sum") if isinstance(one, Mapping) else None
    tokens = one.get("tokens") if isinstance(one, Mapping) else None
    if not isinstance(nats, int | float) or math.isnan(nats) or not isinstance(tokens, int) or tokens < 1:
        raise UserError(
            f"{_where(record)}: logprobs of '{choice}': use {{'sum': nats, 'tokens': 1 or more}}, got {one}"
        )
    return nats / tokens if rank == "token" else float(nats)


def _where(record: Mapping[str, Any]) -> str:
    return f"suite {record.get('suite')}, {record.get('id')}"
