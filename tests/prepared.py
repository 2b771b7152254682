"""What a stage does to a model before it is trained, for jobs: adapters, compiled layers, checkpointed layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from opsin.algorithms.base import VisionAlgorithm
from opsin.models.adapters import LoraSettings, add_adapters
from opsin.models.checkpointing import checkpoint_layers
from opsin.models.compile import CompileSettings, compile_model
from opsin.models.export import export_model
from opsin.models.vlm import VisionLanguageModel


def prepare(
    model: VisionLanguageModel,
    *,
    lora: dict[str, Any] | None = None,
    compiled: Any = False,
    checkpointing: bool = False,
    attention: str | None = None,
    dropout: float = 0.0,
) -> None:
    """In the order of ``training.stage_run.build_model``; ``dropout``: of attention, drawn from torch's generator."""
    if attention is not None:
        model.hf.set_attn_implementation(attention)
    if lora is not None:
        add_adapters(model, LoraSettings.of(lora), seed=5)
    if checkpointing:
        checkpoint_layers(model)
    compile_model(model, CompileSettings.of(compiled))
    for layer in model.anatomy.decoder_layers(model.hf) if dropout else ():
        layer.self_attn.attention_dropout = dropout


class Export(VisionAlgorithm):
    """Writes the model as a folder when training ends, and what it says to a batch before that: ``logits.pt``."""

    name: ClassVar[str] = "export"

    def __init__(self, folder: str, sharded: bool = False):
        self.folder, self.sharded = folder, sharded
        self.seen: dict[str, Any] | None = None

    def before_forward(self, model: Any, state: Any, logger: Any) -> None:
        self.seen = state.batch

    def fit_end(self, model: Any, state: Any, logger: Any) -> None:
        if not self.sharded:
            model.eval()
            torch.save(model.logits(self.seen), f"{self.folder}.pt")
        export_model(model, self.folder)
