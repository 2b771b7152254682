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


@dataclass(frozen=True)
class Branch:
    """A second pass of some tokens alone through the first layers of the language model.

    For a method that wants to know what the model makes of an image under other circumstances, while the text goes on as
    if nothing had happened. W rows, M tokens.

    Attributes:
        positions: (W, M) int64 into the flattened (B * L) tokens of the micro-batch: whose embeddings (without any
            method's edits) and position ids are taken; -1: padding.
        layers: how many layers, 1 .. N.
        visibility: who sees whom, fields (W, M).
        edit: function of the embeddings (W, M, D), out of place.
    """

    positions: torch.Tensor
    layers: int
    visibility: Visibility
    edit: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Apart:
    """Labelled tokens that are predicted in a pass of their own: the same tokens, seen by each other in another way.

    What is learnt at them goes through that pass alone, what is learnt elsewhere through the ordinary one. It knows no
    edits, taps or branches. n labelled tokens.

    Attributes:
        labels: (n,) bool, which of the micro-batch's labelled tokens.
        visibility: attention terms in place of those set by methods; see ``attention.Visibility``.
    """

    labels: torch.Tensor
    visibility: dict[str, torch.Tensor]


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
        branches: method name -> a second pass; all ranks must ask for the same ones in every micro-batch.
        branched: method name -> (W, M, D) output of the branch's last layer, filled by the forward pass.
        apart: labelled tokens with a pass of their own; all ranks must ask for it in every micro-batch, or none. None: no
            such pass.
        embeddings: (B, L, D) before all edits, while there are branches or a pass apart.
        zero: scalar 0 that depends on tower and projector, where no row has a picture; added to the embeddings.
    """

    batch: dict
    hidden: torch.Tensor | None = None
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)
    visibility: dict[str, torch.Tensor] = field(default_factory=dict)
    taps: set[int] = field(default_factory=set)
    tapped: dict[int, torch.Tensor] = field(default_factory=dict)
    branches: dict[str, Branch] = field(default_factory=dict)
    branched: dict[str, torch.Tensor] = field(default_factory=dict)
    apart: Apart | None = None
    embeddings: torch.Tensor | None = None
    zero: torch.Tensor | None = None

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
        image, alone = batch["image_ids"], batch.get("plain_attention", False)
        positions = batch.get("position_ids")
        see = Visibility(
            valid=batch["attention_mask"].bool(),
            document=None if alone else batch["document_ids"],
            branch=None if alone else batch["branch_ids"],
            image=image,
            bidirectional=image >= 0 if bidirectional_images else None,
            position=positions if positions is not None and positions.ndim == 2 else None,
        )
        return see.with_terms(**self.visibility)
