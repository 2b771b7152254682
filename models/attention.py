"""The forms of attention masks that kernels take, all made from the one predicate in :mod:`.visibility`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import blocks
from .errors import UserError
from .visibility import Tokens, Visibility, of_tokens, queries_and_keys, rule

TAKE_MASKS = ("sdpa", "eager", "flex_attention")
"""Attention implementations that take any mask; others have their own causal one."""

CPU_PIECE = 1 << 19
"""Elements of a mask that a CPU makes at a time."""


def allow(see: Visibility, b: Any, q: Any, k: Any) -> torch.Tensor:
    """Whether query ``q`` of row ``b`` may attend to key ``k``; indices broadcast against each other."""
    return mask_mod(see)(b, 0, q, k)


def _written(
    see: Visibility, dtype: torch.dtype, finish: Callable[[torch.Tensor], Any] = lambda mask: None
) -> torch.Tensor:
    """(B, 1, L, L): the predicate as 1 and 0, and what ``finish`` makes of that in place."""
    batch, length = see.valid.shape
    device = see.valid.device
    position = torch.arange(length, dtype=torch.int32, device=device)
    query, key = queries_and_keys(see)
    # Views, not indices: gathering would write each field as large as the mask.
    key = key.map(lambda x: x[:, None, :])
    # On a CPU, in pieces that stay in its cache: fresh pages for a dozen intermediate masks cost more than the rule.
    step = max(1, CPU_PIECE // max(1, batch * length)) if device.type == "cpu" else max(1, length)
    out = torch.empty(batch, length, length, dtype=dtype, device=device)
    for start in range(0, length, step):
        rows = slice(start, start + step)
        some = query.map(lambda x, rows=rows: x[:, rows, None])
        out[:, rows] = rule(of_tokens(some, key, position[rows, None], position))
        finish(out[:, rows])
    return out.unsqueeze(1)


def dense(see: Visibility) -> torch.Tensor:
    """(B, 1, L, L) bool, True where allowed: the form that ``sdpa`` takes."""
    return _written(see, torch.bool)


def additive(see: Visibility, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, L, L), 0 where allowed and the smallest finite number elsewhere: the form that ``eager`` adds."""
    largest = torch.finfo(dtype).max
    # Arithmetic, since filling by a mask takes several times as long on a CPU: 1 and 0 to 0 and -max = min.
    return _written(see, dtype, lambda mask: mask.sub_(1).mul_(largest))


def _mask_mod(query: Tokens, key: Tokens) -> Callable[[Any, Any, Any, Any], torch.Tensor]:
    return lambda b, h, q, k: rule(of_tokens(query.map(lambda x: x[b, q]), key.map(lambda x: x[b, k]), q, k))


def mask_mod(see: Visibility) -> Callable[[Any, Any, Any, Any], torch.Tensor]:
    """The predicate as FlexAttention's ``mask_mod(batch, head, query, key)``."""
    return _mask_mod(*queries_and_keys(see))


def block_mask(see: Visibility, block_size: int = 128) -> Any:
    """FlexAttention's BlockMask; nothing of size L * L is written, nor is the device waited for.

    Blocks that it leaves out are empty, and those that it calls full are; some it keeps may be empty.
    """
    query, key = queries_and_keys(see)
    return blocks.block_mask(query, key, _mask_mod(query, key), block_size)


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


def windows(config: Any) -> dict[str | None, int | None]:
    """Layer type -> how far its layers see, of a decoder's configuration; None: however far.

    One entry under None where all layers see alike; the decoder then takes one mask, else one by layer type.
    """
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return {None: None}
    types = getattr(config, "layer_types", None)
    if not types:
        return {None: int(window)}  # Mistral's
    sliding = {t: int(window) if t == "sliding_attention" else None for t in types}
    return sliding if any(sliding.values()) else {None: None}


def masks_for(see: Visibility, config: Any, dtype: torch.dtype) -> Any:
    """The predicate in the form that a decoder takes: a mask, or one by layer type.

    Args:
        config: of the decoder: its attention implementation and its layers' windows.

    Raises:
        UserError: the implementation takes no arbitrary mask.
    """
    made = {
        kind: mask_for(see.with_terms(window=window), config._attn_implementation, dtype)
        for kind, window in windows(config).items()
    }
    return made.get(None, made)
