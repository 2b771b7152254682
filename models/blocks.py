"""FlexAttention's block mask from summaries of blocks of tokens.

``create_block_mask`` of torch writes the (B, 1, L, L) mask first, unless it is compiled. Here each block of tokens
is summed up in O(L): which flags and groups some or all of its tokens have, between which ordinals they lie. Since
the predicate is monotone, it can be asked about pairs of blocks: of atoms that some pair of tokens may fulfil it
says which blocks cannot be left out, of atoms that every pair fulfils which blocks need no mask inside. Both are
on the safe side: a block too many is computed and masked, a full block too few is masked for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from .visibility import NOT_ASKED, NOT_LATER, NOT_OFFERED, Atoms, Tokens, places, rule


@dataclass(frozen=True)
class _Ordinals:
    """Ordinals of the tokens of each block, all (B, N): of all tokens, and of those that count (``relevant``)."""

    low: torch.Tensor  # over all tokens, relevant or not
    high: torch.Tensor
    first: torch.Tensor  # over relevant ones from 0 on; first > last where there is none
    last: torch.Tensor
    negative: torch.Tensor  # bool, some relevant one is below 0

    @staticmethod
    def of(ordinal: torch.Tensor, relevant: torch.Tensor) -> _Ordinals:
        """Both (B, N, size)."""
        counts = relevant & (ordinal >= 0)
        return _Ordinals(
            low=ordinal.amin(-1),
            high=ordinal.amax(-1),
            first=ordinal.masked_fill(~counts, torch.iinfo(ordinal.dtype).max).amin(-1),
            last=ordinal.masked_fill(~counts, -1).amax(-1),
            negative=(relevant & (ordinal < 0)).any(-1),
        )


def _may_share(query: _Ordinals, key: _Ordinals) -> torch.Tensor:
    """(B, N, N) bool, a superset of the pairs of blocks that share an ordinal: -1 for padding widens no range."""
    in_range = (query.first[:, :, None] <= key.last[:, None]) & (key.first[:, None] <= query.last[:, :, None])
    return in_range | (query.negative[:, :, None] & key.negative[:, None])


def _are_one(query: _Ordinals, key: _Ordinals) -> torch.Tensor:
    """(B, N, N) bool, the pairs of blocks whose tokens all have one ordinal."""
    uniform = (query.low == query.high)[:, :, None] & (key.low == key.high)[:, None]
    return uniform & (query.low[:, :, None] == key.low[:, None])


def _bits(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bits that some, and that all of a block's (B, N, size) words have, (B, N) int64."""
    at = torch.arange(8 * words.element_size(), device=words.device)
    up = ((words.long()[..., None] >> at) & 1).bool()
    return (up.any(2).long() << at).sum(-1), (up.all(2).long() << at).sum(-1)


def _outer_and(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key[:, None] & query[:, :, None]


def block_atoms(query: Tokens, key: Tokens, size: int) -> tuple[Atoms, Atoms]:
    """Atoms of pairs of blocks, (B, N, N): a superset of what holds for some pair of tokens, a subset of all."""
    length = query.flags.shape[1]
    count = -(-length // size)

    def cut(x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        return F.pad(x, (0, count * size - length), value=fill).view(-1, count, size)

    def in_blocks(side: Tokens, no_image: int) -> Tokens:
        # Positions behind the end have no flag, image or group: they fulfil nothing, and make no block full.
        made = side.map(cut)
        return made if side.image is None else replace(made, image=cut(side.image, no_image))

    query, key = in_blocks(query, NOT_ASKED), in_blocks(key, NOT_OFFERED)

    def pair(name: str, of_query: torch.Tensor, of_key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = _Ordinals.of(getattr(query, name), of_query), _Ordinals.of(getattr(key, name), of_key)
        return _may_share(q, k), _are_one(q, k)

    asks, offers = query.flags & NOT_LATER != 0, key.flags & NOT_LATER != 0
    some_image = one_image = some_scope = one_scope = some_group = all_groups = None
    if query.image is not None and key.image is not None:
        of_query, of_key = query.image >= 0, key.image >= 0
        asks, offers = asks | of_query, offers | of_key
        some_image, one_image = pair("image", of_query, of_key)
    if query.groups is not None and key.groups is not None:
        of_query, of_key = query.groups != 0, key.groups != 0
        asks, offers = asks | of_query, offers | of_key
        some_scope, one_scope = pair("scope", of_query, of_key)
        (some_q, all_q), (some_k, all_k) = _bits(query.groups), _bits(key.groups)
        some_group, all_groups = _outer_and(some_q, some_k) != 0, _outer_and(all_q, all_k) != 0
    some_together = all_together = None
    if key.off_trunk is not None and query.off_trunk is not None:
        some_document, one_document = pair("document", asks, offers)
        off_trunk = key.off_trunk != 0
        some_branch, one_branch = pair("branch", asks & (query.off_trunk != 0), offers & off_trunk)
        some_branch = some_branch | (offers & ~off_trunk).any(-1)[:, None]
        one_branch = one_branch | ~off_trunk.any(-1)[:, None]
        some_together, all_together = some_document & some_branch, one_document & one_branch
    (some_q, all_q), (some_k, all_k) = _bits(query.flags), _bits(key.flags)
    block = torch.arange(count, device=query.flags.device)
    diagonal = block[:, None] == block
    some_near, all_near = block <= block[:, None], block < block[:, None]
    if query.reach is not None and key.reach is not None:
        # Positions behind the end count as 0, which makes a window wider for "some" and narrower for "all".
        some_near = some_near & (key.reach.amax(-1)[:, None] > query.reach.amin(-1)[:, :, None])
        all_near = all_near & (key.reach.amin(-1)[:, None] > query.reach.amax(-1)[:, :, None])
    return Atoms(
        flags=_outer_and(some_q, some_k),
        place=places(some_near, diagonal),
        together=some_together,
        image=some_image,
        scope=some_scope,
        group=some_group,
    ), Atoms(
        flags=_outer_and(all_q, all_k),
        place=places(all_near, torch.zeros_like(diagonal)),
        together=all_together,
        image=one_image,
        scope=one_scope,
        group=all_groups,
    )


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N, N) bool to BlockMask's count (B, 1, N) and key blocks, those that count first (B, 1, N, N), int32."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def block_mask(query: Tokens, key: Tokens, mask_mod: Callable[..., torch.Tensor], size: int) -> Any:
    """``torch.nn.attention.flex_attention.BlockMask`` with blocks of ``size`` tokens either way.

    Nothing is made that is larger than O(B * L) or O(B * (L / size)^2); nothing waits for the device.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = query.flags.shape[1]
    some, every = block_atoms(query, key, size)
    full = rule(every)
    return BlockMask.from_kv_blocks(
        *_ordered(rule(some) & ~full),
        *_ordered(full),
        BLOCK_SIZE=size,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )
