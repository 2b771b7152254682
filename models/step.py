"""What methods tell each other and the model about one micro-batch.

A :class:`Step` is made anew for each micro-batch. Methods write into it at ``BEFORE_FORWARD`` and read it at
``AFTER_LOSS``; since nobody reads before everybody wrote, the order of methods never matters. It lives on
the model, not in the batch: Composer copies every micro-batch (``deepcopy``), which fails on tensors that
carry a graph and would copy masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .attention import Visibility

FINAL = -1
"""Tap after the final norm: what the LM head reads."""


@dataclass
class Step:
    """One micro-batch on its way through the model. B rows, L tokens, D width.

    Attributes:
        batch: the micro-batch on its device (never modified).
        hidden: (B, L) bool, positions whose visual content some method replaced; None: none.
        edits: method name -> function of the input embeddings (B, L, D), out of place; applied in the
            order of the names.
        visibility: attention terms set by methods, on top of the batch's own; see ``attention.Visibility``.
        taps: layers whose output is wanted: 1 .. N, or ``FINAL``.
        tapped: layer -> (B, L, D) hidden states, filled by the forward pass.
    """

    batch: dict
    hidden: torch.Tensor | None = None
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    visibility: dict[str, torch.Tensor] = field(default_factory=dict)
    taps: set[int] = field(default_factory=set)
    tapped: dict[int, torch.Tensor] = field(default_factory=dict)

    def hide(self, positions: torch.Tensor) -> None:
        """Mark positions (B, L) bool whose visual content is replaced in this step."""
        self.hidden = positions if self.hidden is None else self.hidden | positions

    def edited(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Input embeddings after all edits."""
        for name in sorted(self.edits):
            embeddings = self.edits[name](embeddings)
        return embeddings

    def sees(self, bidirectional_images: bool) -> Visibility | None:
        """Visibility of this micro-batch; None where the family's own causal mask says it all."""
        batch = self.batch
        if batch.get("plain_attention", False) and not bidirectional_images and not self.visibility:
            return None
        image = batch["image_ids"]
        see = Visibility(
            valid=batch["attention_mask"].bool(),
            document=batch["document_ids"],
            branch=batch["branch_ids"],
            image=image,
            bidirectional=image >= 0 if bidirectional_images else None,
        )
        return see.with_terms(**self.visibility)
