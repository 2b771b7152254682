"""JARVIS as functions on tensors: who sees whom, what is compared, and nothing of Composer (arXiv 2512.15885).

B rows, L tokens, P patches; codes of patches are those of ``sampler``.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .sampler import BLOCKS, CONTEXT, MASKED, MOST_BLOCKS

LOSSES = ("cosine", "smooth_l1")
WEIGHTINGS = ("position", "block")


def on_tokens(values: torch.Tensor, position: torch.Tensor, shape: torch.Size, fill: int) -> torch.Tensor:
    """Values of patches (P,) at their tokens (B, L); ``position`` (P,) int64 into the flattened tokens."""
    out = torch.full((shape.numel(),), fill, dtype=values.dtype, device=values.device)
    return out.index_put_((position,), values).view(shape)


def attention_terms(
    code: torch.Tensor,
    scope: torch.Tensor,
    *,
    hide_unused: bool = False,
    preceding: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Fields of ``models.attention.Visibility`` for masked views (fact sheet, 3.3), all (B, L).

    Args:
        code: int16, of each token's patch; 0 elsewhere.
        scope: int, the view a token belongs to, -1 for none.
        hide_unused: patches that are neither context nor target are seen by no text either.
        preceding: bool, text that visual tokens may see although their view is masked.
    """
    closed = (code & MASKED) != 0
    context = (code & CONTEXT) != 0
    bits = (code & BLOCKS).to(torch.uint8)
    terms = {"closed": closed, "context": context, "group_bits": bits, "scope": scope}
    if hide_unused:
        terms["hidden"] = closed & ~context & (bits == 0)
    if preceding is not None:
        terms["preceding"] = preceding
    return terms


def target_weights(
    code: torch.Tensor, view: torch.Tensor, views: int, weighting: str = "position"
) -> torch.Tensor:
    """How much each patch counts in the loss, (P,) float32; 0: it is no target.

    Args:
        code: (P,) int16.
        view: (P,) int64, the view of each patch.
        views: V.
        weighting: ``position``: the number of blocks that cover it, so that the loss is the mean over all positions of
            all blocks (the code's, where blocks are of one size); ``block``: every block counts alike, whatever its size.
    """
    inside = ((code[:, None] >> torch.arange(MOST_BLOCKS, device=code.device)) & 1).float()  # (P, blocks)
    if weighting == "position":
        return inside.sum(1)
    sizes = torch.zeros(views, MOST_BLOCKS, device=code.device).index_add_(0, view, inside)
    return (inside / sizes.clamp(min=1)[view]).sum(1)


def compared(features: torch.Tensor, loss: str) -> torch.Tensor:
    """Target features as the loss compares them: (..., C) float32 of length 1 (cosine), or layer-normalised (smooth L1)."""
    if loss == "cosine":
        return F.normalize(features.float(), dim=-1)
    return F.layer_norm(features.float(), features.shape[-1:])


def prediction_losses(predicted: torch.Tensor, target: torch.Tensor, loss: str) -> torch.Tensor:
    """Loss of each prediction, (n,) float32.

    Args:
        predicted, target: (n, C).
        loss: ``cosine``: minus the cosine, -1 to 1; ``smooth_l1``: with beta 1 against layer-normalised targets, mean over
            channels.
    """
    target = compared(target, loss)
    if loss == "cosine":
        return -(F.normalize(predicted.float(), dim=-1) * target).sum(-1)
    return F.smooth_l1_loss(predicted.float(), target, reduction="none").mean(-1)


def weighted_sum(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum of losses (n,) with weights (n,): a scalar. Nothing that weighs 0 is read, be it NaN."""
    return torch.where(weights > 0, losses * weights, 0.0).sum()
