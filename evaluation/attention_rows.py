"""Attention of chosen queries in every decoder layer, while the model runs with its own kernel.

``output_attentions`` exists for the ``eager`` kernel alone and keeps B x heads x L x L numbers a layer. Here the
model goes on computing with ``sdpa``; beside it the rows of a few queries are computed once more from the very query and
key states that the kernel is given: after rotary positions of whatever kind, with the kernel's own mask. Thus one path
serves all families, and B x heads x Q x L numbers are held at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.errors import UserError
from ..models.step import Step
from ..models.vlm import VisionLanguageModel

KERNEL = "sdpa"
"""What every registered family supports, and what computes while its arguments are looked at."""


@torch.no_grad()
def attention_rows(model: VisionLanguageModel, batch: dict[str, Any], queries: torch.Tensor) -> torch.Tensor:
    """Attention weights of some queries, mean over heads.

    Args:
        model: in evaluation mode (under dropout these are not the weights that were used).
        batch: a micro-batch of ``data.batch.split_batch``, on the model's device.
        queries: (B, Q) int64 positions in their rows; -1: none.

    Returns:
        (layers, B, Q, L) float32 on the model's device; every row sums to 1 over L, those of -1 are zeros.

    Raises:
        UserError: a layer whose attention does not run through transformers' attention functions.
    """
    with watched(model, queries) as found:
        model.net(batch, Step(batch))
    layers = len(model.anatomy.decoder_layers(model.hf))
    missing = [str(i + 1) for i in range(layers) if i not in found]
    if missing:
        raise UserError(
            f"attention: nothing seen of layers {', '.join(missing)} of {layers} of this {model.anatomy.family} model: "
            f"they do not attend through transformers' '{KERNEL}' function"
        )
    weights = torch.stack([found[i] for i in range(layers)])
    return weights.masked_fill((queries < 0)[None, :, :, None], 0.0)


@contextlib.contextmanager
def watched(model: VisionLanguageModel, queries: torch.Tensor) -> Iterator[dict[int, torch.Tensor]]:
    """Within it, each decoder layer's rows (B, Q, L) appear under the layer's number from 0 when it has run.

    The decoder runs with ``sdpa`` (its setting is put back), so that it gets the mask which that kernel takes:
    transformers' own, or ours. Nothing is hooked; what is exchanged is the function behind the kernel's name, and
    other models, the vision tower too, call through it unwatched.
    """
    config: Any = model.anatomy.decoder(model.hf).config
    numbers = {
        id(part): number
        for number, layer in enumerate(model.anatomy.decoder_layers(model.hf))
        for part in layer.modules()
    }
    found: dict[int, torch.Tensor] = {}
    kernel, chosen = ALL_ATTENTION_FUNCTIONS[KERNEL], config._attn_implementation

    def watching(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        number = numbers.get(id(module))
        if number is not None:
            found.setdefault(number, _weights(module, query, key, attention_mask, queries, options))
        return kernel(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(KERNEL, watching)
    try:
        config._attn_implementation = KERNEL
        # A compiled layer would go on calling the function that it was compiled with.
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        config._attn_implementation = chosen
        AttentionInterface.register(KERNEL, kernel)


def _weights(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    queries: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """(B, Q, L) softmax weights of rows ``queries``, float32, mean over heads.

    Args:
        query: (B, heads, L, D).
        key: (B, key heads, L, D), not repeated.
        mask: (B or 1, heads or 1, L, L) bool, True where allowed, or float, to be added; None: causal, unless the
            module says otherwise.
    """
    batch, heads, width = query.shape[0], query.shape[1], query.shape[3]
    groups, keys = key.shape[1], key.shape[2]
    at = queries.to(query.device).clamp(min=0)
    rows = query.gather(2, at[:, None, :, None].expand(-1, heads, -1, width)).float()
    scaling = options.get("scaling")
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("bgnqd,bgkd->bgnqk", rows.unflatten(1, (groups, -1)), key.float())
        scores = scores * (width**-0.5 if scaling is None else scaling)
    if mask is not None:
        some = mask[..., :keys].expand(batch, -1, -1, -1)
        some = some.gather(2, at[:, None, :, None].expand(-1, some.shape[1], -1, keys))
        some = some.unflatten(1, (groups, -1)) if some.shape[1] == heads else some[:, None]
        scores = scores.masked_fill(~some, -torch.inf) if some.dtype == torch.bool else scores + some.float()
    elif options.get("is_causal") or (
        options.get("is_causal") is None and getattr(module, "is_causal", True)
    ):
        later = torch.arange(keys, device=at.device) > at[..., None]
        scores = scores.masked_fill(later[:, None, None], -torch.inf)
    return scores.softmax(-1).mean((1, 2))
