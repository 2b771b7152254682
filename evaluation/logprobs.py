"""Log-likelihoods of answers: rows of candidates through the model, nats summed answer by answer.

The language-model head runs at answer positions only. Candidates that share a prompt are branches of one row, so K of
them cost about one forward pass over the prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.batch import split_batch, to_device
from ..data.candidates import CandidateRow
from ..data.collate import VLMCollator
from ..models.step import Step
from ..models.vlm import VisionLanguageModel

Around = Callable[[dict[str, Any], Sequence[int]], contextlib.AbstractContextManager]
"""Context for the pass over a micro-batch, made from it and the numbers of its rows."""


@dataclass(frozen=True)
class AnswerLogprob:
    """What a model thinks of one answer.

    Attributes:
        sum: log-likelihood of the answer's tokens, nats; what ends it (EOS, ``<|im_end|>``) is left out.
        tokens: how many these are.
        end: log-likelihood of what ends it, nats; None where the tokenizer has no token for the end alone.
        greedy: whether each of the tokens is the likeliest one after those before it.
        exact: whether the end is, too: greedy decoding gives this answer and nothing else.
        said: ids of what greedy decoding begins with: the answer (and its end) as far as it agrees, then the first
            token that it takes instead.
    """

    sum: float
    tokens: int
    end: float | None
    greedy: bool
    exact: bool
    said: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """Nats a token, the end left out."""
        return self.sum / self.tokens


@dataclass(frozen=True)
class Ranking:
    """Choices of one question by their log-likelihoods; of equal ones the first is best.

    Attributes:
        choices: as given.
        logprobs: one a choice.
    """

    choices: tuple[str, ...]
    logprobs: tuple[AnswerLogprob, ...]

    @property
    def best(self) -> str:
        """The likeliest choice: largest sum of nats. It favours short choices."""
        return self._largest(lambda one: one.sum)

    @property
    def best_by_mean(self) -> str:
        """The choice with the largest mean a token. It favours choices whose later tokens follow from the first."""
        return self._largest(lambda one: one.mean)

    def _largest(self, key: Callable[[AnswerLogprob], float]) -> str:
        values = [key(one) for one in self.logprobs]
        return self.choices[values.index(max(values))]


def score_rows(
    model: VisionLanguageModel,
    collator: VLMCollator,
    rows: Sequence[CandidateRow],
    batch_size: int,
    around: Around | None = None,
) -> list[list[AnswerLogprob]]:
    """Log-likelihoods of the slots of each row, in order. Mode and gradients are the caller's.

    Args:
        model: in evaluation mode.
        collator: its encoder made the rows.
        rows: in any order; rows of like length go together.
        batch_size: rows a forward pass.
        around: context for each pass; None: none.
    """
    plain = VLMCollator(collator.encoder, pad_to_multiple_of=collator.pad_to_multiple_of)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scored: list[list[AnswerLogprob]] = [[] for _ in rows]
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        chosen = [rows[i] for i in numbers]
        batch = plain.layout([row.document for row in chosen])
        # Answers of earlier exchanges are context here.
        batch["loss_weights"] = torch.where(batch["turn_ids"] >= 0, batch["loss_weights"], 0.0)
        batch["sample_status"] = torch.zeros(len(chosen), dtype=torch.int8)
        (micro,) = split_batch(batch, None, training=False)
        length = micro["input_ids"].shape[1]
        row, part = micro["label_rows"] // length, micro["label_turns"].long()  # still on the host
        micro = to_device(micro, device)
        context = contextlib.nullcontext() if around is None else around(micro, numbers)
        with model.net.autocast(), context:
            outputs = model.net(micro, Step(micro))
        found = torch.stack([-outputs["nll"], outputs["correct"].float()]).cpu().double()
        likeliest = outputs["likeliest"].tolist()
        for i, answers in zip(numbers, _summed(row, part, found, likeliest, chosen), strict=True):
            scored[i] = answers
    return scored


def _summed(
    row: torch.Tensor,
    part: torch.Tensor,
    found: torch.Tensor,
    likeliest: list[int],
    chosen: Sequence[CandidateRow],
) -> list[list[AnswerLogprob]]:
    """Sums of each part of each row. ``row``, ``part`` (n,); ``found`` (2, n): nats, and 1 where it is the likeliest."""
    parts = 2 * max(len(r.slots) for r in chosen)
    key = row * parts + part
    table = torch.zeros(3, len(chosen) * parts, dtype=torch.float64)
    table.index_add_(1, key, torch.cat([found, torch.ones(1, len(key), dtype=torch.float64)]))
    nats, agreed, count = table.unflatten(1, (len(chosen), parts)).tolist()
    said: list[list[list[int]]] = [[[] for _ in one.slots] for one in chosen]
    over: set[tuple[int, int]] = set()
    for r, p, same, token in zip(row.tolist(), part.tolist(), found[1].tolist(), likeliest, strict=True):
        if (r, p // 2) not in over:  # labels of a row are in the order of its tokens
            said[r][p // 2].append(token)
            if not same:
                over.add((r, p // 2))
    return [
        [
            AnswerLogprob(
                sum=nats[r][2 * s],
                tokens=int(count[r][2 * s]),
                end=nats[r][2 * s + 1] if count[r][2 * s + 1] else None,
                greedy=agreed[r][2 * s] == count[r][2 * s],
                exact=agreed[r][2 * s] + agreed[r][2 * s + 1] == count[r][2 * s] + count[r][2 * s + 1],
                said=tuple(said[r][s]),
            )
            for s in range(len(one.slots))
        ]
        for r, one in enumerate(chosen)
    ]
