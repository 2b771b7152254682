"""Log-likelihoods of the answers that samples bring, with what cannot be scored named instead of raised; for analyses."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from .adapter import VLMAdapter
from .logprobs import AnswerLogprob
from .ranks import on_all_ranks
from .scorers.base import Measure

Samples = list[dict[str, Any]]


def stored_answers(
    adapter: VLMAdapter,
    samples: Sequence[dict[str, Any]],
    change: Callable[[Samples], Samples] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[AnswerLogprob] | str]:
    """The stored answer of each exchange of each sample. Every rank calls this with the same samples.

    Args:
        adapter: the model.
        samples: stored form.
        change: what is done to some samples just before they are scored (pictures changed, say), one by one and in order.
        progress: called after each call with (calls done, calls) of this rank.

    Returns:
        for each sample its exchanges' log-likelihoods, or why it cannot be used.
    """

    def work(part: Samples) -> list[list[AnswerLogprob] | str]:
        skipped: dict[int, str] = {}
        found = adapter.answer_logprobs(part if change is None else change(part), skipped=skipped)
        return [
            skipped[i] if i in skipped else [candidates[0] for candidates in exchanges]
            for i, exchanges in enumerate(found)
        ]

    return on_all_ranks(samples, work, adapter.batch_size, progress)


def clustered(values: Sequence[float], clusters: Sequence[Hashable], unit: str = "share") -> Measure:
    """Mean of values that hang together, with a standard error that knows it.

    Several questions about one picture are not so many independent ones. Residuals are summed within each cluster before
    they are squared (the cluster-robust error of a mean, with the factor G / (G - 1)); with a value a cluster it is the
    usual standard error.

    Args:
        values: n numbers.
        clusters: what each belongs to (its picture).
        unit: see :class:`Measure`.
    """
    n = len(values)
    if not n:
        return Measure(None, 0, None, unit)
    mean = math.fsum(values) / n
    residual: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        residual[cluster] = residual.get(cluster, 0.0) + value - mean
    groups = len(residual)
    if groups < 2:
        return Measure(mean, n, None, unit)
    squares = math.fsum(r * r for r in residual.values())
    return Measure(mean, n, math.sqrt(squares * groups / (groups - 1)) / n, unit)
