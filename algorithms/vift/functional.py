"""ViFT as plain functions on tensors: which samples break its promise, and how two prompts' states are fused.

Source: "Do we Really Need Visual Instructions?" (arXiv 2502.11427). A model is trained on captions and text-only
instructions together; while answering about a picture, hidden states of the question alone (T) and of the question
with the picture (M) are combined in the prompt. The released code adds, at the input of each decoder layer,

    x <- x + a * t - b * m

and a review of the paper gives, for one layer, ``alpha_p * x + beta_p * t``; with b = 1 - alpha_p and a = beta_p both
are the same wherever x is m. Nothing here imports Composer or Streaming.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...data.schema import Role

MODES = ("add", "replace")
"""``add``: x + a t - b m (the released code); ``replace``: (1 - b) x + a t (the review's formula), m is not needed."""


def refused_documents(
    *,
    roles: torch.Tensor,
    document_ids: torch.Tensor,
    image_ids: torch.Tensor,
    sentence_ids: torch.Tensor,
    pool: torch.Tensor,
    documents: int,
) -> torch.Tensor:
    """Documents that have a picture and a user's sentence that is no caption prompt. Arguments (B, L) unless said.

    Args:
        pool: (K,) int64 ids of the sentences that may stand beside a picture; none: no words at all.
        documents: the most documents in a row, D.

    Returns:
        (B, D) bool.
    """
    asks = (roles == Role.INSTRUCTION) & (sentence_ids != 0) & ~torch.isin(sentence_ids, pool)
    return _any_in(asks, document_ids, documents) & shows_picture(image_ids, document_ids, documents)


def shows_picture(image_ids: torch.Tensor, document_ids: torch.Tensor, documents: int) -> torch.Tensor:
    """Documents with a picture: (B, L), (B, L) -> (B, D) bool."""
    return _any_in(image_ids >= 0, document_ids, documents)


def _any_in(tokens: torch.Tensor, document_ids: torch.Tensor, documents: int) -> torch.Tensor:
    found = torch.zeros(tokens.shape[0], documents, dtype=torch.bool)
    at = document_ids.long().clamp(min=0)
    return found.scatter_reduce(1, at, tokens & (document_ids >= 0), "amax", include_self=True)


@dataclass(frozen=True)
class Suffix:
    """The tokens of each row of a batch that are fused. n of all rows together, row after row, left to right.

    Attributes:
        rows: (n,) int64.
        columns: (n,) int64.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def to(self, device: torch.device) -> Suffix:
        """The same on a device."""
        return Suffix(self.rows.to(device), self.columns.to(device))


def prompt_ends(attention_mask: torch.Tensor) -> torch.Tensor:
    """Where each row's last token ends: (B, L) -> (B,) int64, first column behind it."""
    length = attention_mask.shape[1]
    return length - attention_mask.long().flip(1).argmax(1)


def common_suffix(
    first: torch.Tensor,
    first_mask: torch.Tensor,
    first_ends: torch.Tensor,
    second: torch.Tensor,
    second_mask: torch.Tensor,
    second_ends: torch.Tensor,
) -> torch.Tensor:
    """How many tokens at their ends two prompts have in common, row by row.

    Args:
        first, second: (B, L1), (B, L2) int64 token ids, padded on any side.
        first_mask, second_mask: 1 for tokens.
        first_ends, second_ends: (B,) first column behind each prompt.

    Returns:
        (B,) int64.
    """
    back = torch.arange(1, min(first.shape[1], second.shape[1]) + 1)

    def from_the_end(
        ids: torch.Tensor, mask: torch.Tensor, ends: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = ends[:, None] - back
        inside = at >= 0
        at = at.clamp(min=0)
        return ids.gather(1, at), inside & mask.gather(1, at).bool()

    a, real_a = from_the_end(first, first_mask, first_ends)
    b, real_b = from_the_end(second, second_mask, second_ends)
    return ((a == b) & real_a & real_b).long().cumprod(1).sum(1)


def last_tokens(lengths: torch.Tensor, ends: torch.Tensor) -> Suffix:
    """The last ``lengths`` (B,) columns before ``ends`` (B,) of each row."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    before = (lengths.cumsum(0) - lengths)[rows]
    return Suffix(rows, (ends - lengths)[rows] + torch.arange(len(rows)) - before)


def fused_states(
    states: torch.Tensor,
    text: torch.Tensor,
    multimodal: torch.Tensor | None,
    *,
    a: float,
    b: float,
    mode: str = "add",
    preserve_norm: bool = False,
) -> torch.Tensor:
    """States after fusion, computed in float32 and given in their own dtype. All (n, D).

    Args:
        states: running states x at the input of a layer.
        text: t, of the question alone.
        multimodal: m, of the question with its picture; None where b or ``mode`` does not need it.
        a: weight of ``text`` (the code's alpha, the review's beta_p).
        b: weight that is taken from ``multimodal`` (1 - alpha_p).
        mode: one of :data:`MODES`.
        preserve_norm: rescale each state to the norm it had (not in the released code).
    """
    x = states.float()
    if mode == "replace":
        new = (1 - b) * x + a * text.float()
    else:
        change = a * text.float()
        if multimodal is not None and b:
            change = (
                change - b * multimodal.float()
            )  # first, so that without a picture (t = m, a = b) it is 0 exactly
        new = x + change
    if preserve_norm:
        new = new * (x.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return new.to(states.dtype)
