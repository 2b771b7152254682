"""What a stage does to a model before it is trained, for jobs: adapters, compiled layers, checkpointed layers."""

from __future__ import annotations

from typing import Any

from opsin.models.adapters import LoraSettings, add_adapters
from opsin.models.checkpointing import checkpoint_layers
from opsin.models.compile import CompileSettings, compile_model
from opsin.models.vlm import VisionLanguageModel


def prepare(
    model: VisionLanguageModel,
    *,
    lora: dict[str, Any] | None = None,
    compiled: Any = False,
    checkpointing: bool = False,
    dropout: float = 0.0,
) -> None:
    """In the order of ``training.stage_run.build_model``; ``dropout``: of attention, drawn from torch's generator."""
    if lora is not None:
        add_adapters(model, LoraSettings.of(lora), seed=5)
    if checkpointing:
        checkpoint_layers(model)
    compile_model(model, CompileSettings.of(compiled))
    for layer in model.anatomy.decoder_layers(model.hf):
        layer.self_attn.attention_dropout = dropout
