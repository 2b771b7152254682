"""Activation checkpointing of the decoder's layers: less memory, each layer's forward pass once more in the backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .vlm import VisionLanguageModel


def checkpoint_layers(model: VisionLanguageModel) -> None:
    """Recompute each decoder layer while differentiating; random states (dropout) are those of the first pass.

    Never reentrant: that fires layer hooks twice and would replace taps during backward.
    """
    decoder: Any = model.anatomy.decoder(model.hf)
    decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
