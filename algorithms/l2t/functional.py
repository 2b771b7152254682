"""L2T as plain functions on tensors: which instruction tokens are learnt, and at what weight.

Source: "Learning to Instruct for Visual Instruction Tuning" (arXiv 2503.22215). The loss is the ordinary
response loss plus the negative log-likelihood of the instruction, given the picture and the words before:

    L = ( lambda_A * sum_A nll + lambda_I * sum_{I \\ T} w * nll ) / Z

where T are templates: system text, role markers, and frequent task sentences. The paper writes both sums
unweighted; weights and choices of Z are options whose effect has to be measured.

Nothing here imports Composer or Streaming.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch

from ...data.schema import IGNORE_INDEX, Role
from ...data.sentences import SentenceCounts, sentence_id

TURNS = ("all", "first", "later")
NORMALISATIONS = ("pooled", "weighted", "separate", "response")


@dataclass(frozen=True)
class Template:
    """One task template: its normalised sentence, and in how many turns it was counted."""

    sentence: str
    count: int


def frequent_sentences(
    counts: SentenceCounts,
    *,
    min_count: int = 50,
    min_share: float = 1e-3,
    top_k: int = 50,
    min_words: int = 3,
    allow: Collection[str] = (),
) -> list[Template]:
    """Task templates by frequency: at least ``max(min_count, min_share * turns)`` turns, the ``top_k`` most frequent.

    Sentences of fewer than ``min_words`` words ("Why?") count only when named in ``allow``. The thresholds
    are Opsin's own: the paper says only that the most frequent sentences of the training set are taken.

    Returns:
        templates, most frequent first; equal counts in alphabetical order.
    """
    needed = max(min_count, min_share * counts.turns)
    frequent = [
        Template(key, count)
        for key, count in counts.counts.items()
        if count >= needed and (len(key.split()) >= min_words or key in allow)
    ]
    return sorted(frequent, key=lambda t: (-t.count, t.sentence))[:top_k]


def removed_share(templates: Collection[Template], words: int) -> float:
    """Share of all instruction words that lie in the templates, 0 .. 1."""
    return min(1.0, sum(t.count * len(t.sentence.split()) for t in templates) / max(words, 1))


def counted(sentences: Collection[str], counts: Counter[str]) -> list[Template]:
    """A given list of sentences with their counts in a dataset, most frequent first."""
    return sorted(
        (Template(s, counts.get(s, 0)) for s in set(sentences)), key=lambda t: (-t.count, t.sentence)
    )


def template_ids(templates: Collection[Template]) -> torch.Tensor:
    """(K,) int64 sorted ids, as they stand in a batch's ``sentence_ids``."""
    return torch.tensor(sorted({sentence_id(t.sentence) for t in templates} - {0}), dtype=torch.int64)


def instruction_mask(
    *,
    roles: torch.Tensor,
    turn_ids: torch.Tensor,
    branch_ids: torch.Tensor,
    document_ids: torch.Tensor,
    image_ids: torch.Tensor,
    sentence_ids: torch.Tensor,
    templates: torch.Tensor,
    turns: str = "all",
    on_text_only: bool = False,
) -> torch.Tensor:
    """Which tokens L2T adds to the labels: what the user said, minus templates. All arguments (B, L).

    Never system text, role markers, separators, visual tokens or padding: labels are built from what a token
    is, not by unmasking everything. Words that precede the last picture of their turn cannot see it and stay
    out. Punctuation alone is no instruction: documents in which no user turn has a sentence give nothing. Independent
    questions about one picture (``branch_ids`` > 0) are each a first turn.

    Args:
        templates: (K,) int64 sentence ids. A token that straddles two sentences stays out when K > 0.
        turns: learn ``all`` user turns, only the ``first``, or only ``later`` ones.
        on_text_only: also in documents without a picture (the paper's formula needs one; off by default).

    Returns:
        (B, L) bool.
    """
    learnt = roles == Role.INSTRUCTION
    if len(templates):
        learnt &= ~torch.isin(sentence_ids, templates) & (sentence_ids != 0)
    if turns not in TURNS:
        raise ValueError(f"turns '{turns}': use one of {', '.join(TURNS)}")
    if turns != "all":
        first = turn_ids <= 0
        learnt &= (first | (branch_ids > 0)) if turns == "first" else ~(first | (branch_ids > 0))
    visual = image_ids >= 0
    document = document_ids.long().clamp(min=0)
    documents = int(document.max()) + 1 if document.numel() else 1

    def having(tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of documents in which there is one of these."""
        found = torch.zeros(roles.shape[0], documents, dtype=torch.bool)
        found = found.scatter_reduce(1, document, tokens & (document_ids >= 0), "amax", include_self=True)
        return found.gather(1, document)

    learnt &= having((roles == Role.INSTRUCTION) & (sentence_ids != 0))
    if not on_text_only:
        learnt &= having(visual)
    # Last picture of each (document, turn): words before it are predicted without having seen it.
    exchanges = int(turn_ids.max()) + 2 if turn_ids.numel() else 1
    group = document * exchanges + turn_ids.long() + 1
    place = torch.arange(roles.shape[1]).expand_as(roles)
    last = torch.full((roles.shape[0], documents * exchanges), -1, dtype=torch.int64)
    last = last.scatter_reduce(1, group, torch.where(visual, place, -1), "amax", include_self=True)
    return learnt & (place > last.gather(1, group))


def l2t_labels(labels: torch.Tensor, input_ids: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
    """Labels (B, L) with the instruction tokens of ``learnt`` added to those of ordinary instruction tuning."""
    return torch.where(learnt, input_ids, labels)


def l2t_weights(
    learnt: torch.Tensor, *, lambda_instruction: float, lambda_response: float, base: torch.Tensor
) -> torch.Tensor:
    """Loss weights (B, L): ``lambda_instruction`` on instruction tokens, ``lambda_response`` elsewhere, times ``base``."""
    return torch.where(learnt, lambda_instruction, lambda_response) * base


def normaliser(
    n_response: torch.Tensor,
    n_instruction: torch.Tensor,
    *,
    lambda_instruction: float,
    lambda_response: float,
    normalisation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Z, and a factor on the instruction weights, from global counts of labelled tokens.

    ========== ============================== ==================================================
    name       Z                              meaning
    ========== ============================== ==================================================
    pooled     n_A + n_I                      one mean over all labelled tokens (the default; what
                                              Hugging Face's loss does under a changed mask)
    weighted   lambda_A n_A + lambda_I n_I    weighted mean
    separate   n_A, factor n_A / n_I          mean_A + lambda_I mean_I
    response   n_A                            response loss as without L2T, plus the rest
    ========== ============================== ==================================================
    """
    one = torch.ones_like(n_response, dtype=torch.float64)
    if normalisation == "pooled":
        return n_response + n_instruction, one
    if normalisation == "weighted":
        return lambda_response * n_response + lambda_instruction * n_instruction, one
    if normalisation == "separate":
        return n_response, n_response.clamp(min=1) / n_instruction.clamp(min=1)
    if normalisation == "response":
        return n_response, one
    raise ValueError(f"normalisation '{normalisation}': use one of {', '.join(NORMALISATIONS)}")


def visual_relevance(
    nll_with: torch.Tensor, nll_without: torch.Tensor, *, clip: tuple[float, float]
) -> torch.Tensor:
    """Weight of each token by what the picture tells about it: log p with minus log p without it, clipped.

    Args:
        nll_with, nll_without: (n,) nats, from a frozen model.
        clip: smallest and largest weight.

    Returns:
        (n,) float32.
    """
    return (nll_without - nll_with).float().clamp(*clip)


def is_instruction(labels: torch.Tensor, roles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labelled instruction tokens and labelled response tokens, (B, L) bool each."""
    labelled = labels != IGNORE_INDEX
    return labelled & (roles == Role.INSTRUCTION), labelled & (roles == Role.RESPONSE)
