"""Who may look at whom: one predicate, and the forms of it that attention kernels take.

:func:`allow` says for a query and a key whether the one may attend to the other. Dense masks and the
FlexAttention block mask are both made from it, so they cannot disagree (a property test holds them
together). It knows no method: a method that restricts attention fills the optional fields of
:class:`Visibility`, per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from .errors import UserError


@dataclass(frozen=True)
class Visibility:
    """Per-token data from which :func:`allow` decides. Every tensor is (B, L).

    Attributes:
        valid: bool, False for padding.
        document: int, documents packed into one row do not see each other.
        branch: int, 0 for a document's trunk; branches (independent questions) see trunk and themselves.
        image: int, ordinal of the image within its row, -1 for text.
        bidirectional: bool, image tokens with True see all tokens of their own image; None: all causal.
        closed: bool, queries that see nothing but, within their scope, ``context`` tokens and tokens that
            share one of their group bits, and ``preceding`` tokens; not even themselves, unless one of these
            says so. Whoever fills it leaves each closed query something to see: a softmax over nothing is
            NaN. Padding is never closed. None: no such queries. Needs ``context`` and ``group_bits``.
        context: bool, tokens that closed queries of the same scope see.
        group_bits: int, groups a token belongs to, one bit each.
        hidden: bool, image tokens that no open query sees (closed queries go by ``context`` and groups).
        scope: int, what closed queries see through ``context`` and groups shares their scope (one picture may
            have two views, each masked on its own); -1: none. None: the image ordinal.
        preceding: bool, tokens that closed queries see besides where they come first (``k <= q``), whatever
            their scope: the text before a picture. None: none.
    """

    valid: torch.Tensor
    document: torch.Tensor
    branch: torch.Tensor
    image: torch.Tensor
    bidirectional: torch.Tensor | None = None
    closed: torch.Tensor | None = None
    context: torch.Tensor | None = None
    group_bits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    scope: torch.Tensor | None = None
    preceding: torch.Tensor | None = None

    def with_terms(self, **terms: torch.Tensor) -> Visibility:
        """The same, with some of the optional fields set."""
        return replace(self, **terms)

    def to(self, device: torch.device) -> Visibility:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Visibility(**{name: value.to(device) for name, value in moved.items() if value is not None})


def allow(see: Visibility, b: Any, q: Any, k: Any) -> torch.Tensor:
    """Whether query ``q`` of row ``b`` may attend to key ``k``; indices broadcast against each other.

    Packed documents follow their own causal order; images may be bidirectional; closed queries are those of
    a masked-prediction method (JARVIS fact sheet, section 3.3, is one filling of these fields). Every other
    token, padding too, may always look at itself, so that no softmax runs over nothing.
    """
    itself = q == k
    causal = k <= q
    open_rule = causal
    same_image = (see.image[b, q] == see.image[b, k]) & (see.image[b, q] >= 0)
    if see.bidirectional is not None:
        open_rule = open_rule | (same_image & see.bidirectional[b, q])
    if see.hidden is not None:
        open_rule = open_rule & ~see.hidden[b, k]
    rule = open_rule
    if see.closed is not None:
        assert see.context is not None and see.group_bits is not None
        shared = (see.group_bits[b, q] & see.group_bits[b, k]) != 0
        scope = see.image if see.scope is None else see.scope
        same_scope = (scope[b, q] == scope[b, k]) & (scope[b, q] >= 0)
        closed_rule = same_scope & (see.context[b, k] | shared)
        if see.preceding is not None:
            closed_rule = closed_rule | (causal & see.preceding[b, k])
        rule = torch.where(see.closed[b, q], closed_rule, open_rule)
        itself = itself & ~see.closed[b, q]
    same_document = see.document[b, q] == see.document[b, k]
    same_branch = (see.branch[b, k] == 0) | (see.branch[b, q] == see.branch[b, k])
    return (rule & see.valid[b, k] & same_document & same_branch) | itself


def dense(see: Visibility) -> torch.Tensor:
    """(B, 1, L, L) bool, True where allowed: the form that ``sdpa`` takes."""
    batch, length = see.valid.shape
    device = see.valid.device
    b = torch.arange(batch, device=device).view(-1, 1, 1)
    q = torch.arange(length, device=device).view(1, -1, 1)
    k = torch.arange(length, device=device).view(1, 1, -1)
    return allow(see, b, q, k).unsqueeze(1)


def additive(see: Visibility, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, L, L), 0 where allowed and the smallest finite number elsewhere: the form that ``eager`` adds."""
    mask = dense(see)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def mask_mod(see: Visibility) -> Callable[[Any, Any, Any, Any], torch.Tensor]:
    """The predicate as FlexAttention's ``mask_mod(batch, head, query, key)``."""
    return lambda b, h, q, k: allow(see, b, q, k)


def block_mask(see: Visibility, block_size: int = 128) -> Any:
    """FlexAttention's BlockMask; nothing of size L * L is written."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = see.valid.shape
    return create_block_mask(
        mask_mod(see), batch, None, length, length, device=str(see.valid.device), BLOCK_SIZE=block_size
    )


def is_plain(batch: dict[str, torch.Tensor]) -> bool:
    """Whether a (CPU) batch needs no mask of ours: one document a row, no branches, so that causal + padding do."""
    return not bool((batch["branch_ids"] > 0).any()) and not bool((batch["document_ids"] > 0).any())


def mask_for(see: Visibility, implementation: str, dtype: torch.dtype) -> Any:
    """The predicate in the form that an attention implementation takes.

    Raises:
        UserError: the implementation takes no arbitrary mask.
    """
    if implementation == "sdpa":
        return dense(see)
    if implementation == "eager":
        return additive(see, dtype)
    if implementation == "flex_attention":
        return block_mask(see)
    raise UserError(
        f"attention implementation '{implementation}' takes no mask of its own, which packing, independent turns, "
        "bidirectional images and masked prediction need; set model.attn_implementation to sdpa or flex_attention"
    )
