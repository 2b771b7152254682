"""Parts of a model: which are trained, at which learning rate, how large they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .anatomy import PARTS
from .errors import UserError, nearest

if TYPE_CHECKING:
    from .vlm import VisionLanguageModel

_HF, _HEADS = "net.hf.", "net.auxiliary."


def named_parts(model: VisionLanguageModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(part, name, parameter) of every parameter; tied ones once."""
    for name, parameter in model.named_parameters():
        if name.startswith(_HEADS):
            yield "auxiliary", name, parameter
        else:
            yield model.anatomy.part_of(name.removeprefix(_HF)), name, parameter


TRAINABLE = (*PARTS[:3], "embeddings")
"""What ``trainable:`` may name: the parts, and the language model's embeddings and head within theirs."""


def set_trainable(model: VisionLanguageModel, trainable: Mapping[str, bool]) -> None:
    """Freeze and unfreeze parts (``vision_tower``, ``mm_projector``, ``language_model``).

    ``embeddings: false`` keeps the language model's token embeddings and head frozen although
    ``language_model`` is trained (with a vocabulary of 49,152 they are a fifth of SmolLM2-135M).

    Parameters of a trained vision tower that no output reads (LLaVA takes layer -2: the last layer and the
    final norm are computed for nothing) stay frozen: they would never get a gradient, which stops DDP.

    Raises:
        UserError: unknown part.
    """
    for part in trainable:
        if part not in TRAINABLE:
            raise UserError(f"trainable.{part}: unknown part{nearest(part, TRAINABLE)}")
    for part, _, parameter in named_parts(model):
        if part in trainable:
            parameter.requires_grad_(bool(trainable[part]))
    if not trainable.get("embeddings", True):
        for module in (model.hf.get_input_embeddings(), model.hf.get_output_embeddings()):
            module.requires_grad_(False)
    if trainable.get("vision_tower"):
        for parameter in unused_in_tower(model):
            parameter.requires_grad_(False)
    if model.training:
        model.train()


def unused_in_tower(model: VisionLanguageModel) -> list[nn.Parameter]:
    """Parameters of tower and projector that image features do not depend on, found by differentiating once."""
    candidates = [
        p for part, _, p in named_parts(model) if part in ("vision_tower", "mm_projector") and p.requires_grad
    ]
    if not candidates:
        return []
    tower = model.hf.get_submodule(model.anatomy.vision_tower[0])
    reference = next(tower.parameters())
    mode = tower.training
    tower.eval()
    with torch.enable_grad():
        pixels = model.anatomy.dummy(model.hf, reference.device, reference.dtype)
        features = model.anatomy.image_features(model.hf, pixels)
        gradients = torch.autograd.grad(features.sum(), candidates, allow_unused=True)
    tower.train(mode)
    return [p for p, g in zip(candidates, gradients, strict=True) if g is None]


def parameter_groups(
    model: VisionLanguageModel, lr: float, lr_by_part: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: by part, and by whether weight decay applies (not to norms, biases and embeddings of one axis).

    Raises:
        UserError: a rate for an unknown or frozen part.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for part, _, parameter in named_parts(model):
        if parameter.requires_grad:
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    for part in lr_by_part:
        if part not in PARTS:
            raise UserError(f"lr_by_part.{part}: unknown part{nearest(part, PARTS)}")
        if part != "auxiliary" and not any(p == part for p, _ in groups):
            raise UserError(f"lr_by_part.{part}: this part is frozen (trainable.{part}: false)")
    return [
        {
            "params": parameters,
            "lr": lr_by_part.get(part, lr),
            "weight_decay": weight_decay if matrix else 0.0,
            "part": part,
        }
        for (part, matrix), parameters in sorted(
            groups.items(), key=lambda kv: (PARTS.index(kv[0][0]), kv[0][1])
        )
    ]


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part."""

    part: str
    trainable: int
    frozen: int


def count_parameters(model: VisionLanguageModel) -> list[PartCount]:
    """Trainable and frozen parameters of each part (works on the meta device; tied ones count once)."""
    counts = {part: [0, 0] for part in PARTS}
    for part, _, parameter in named_parts(model):
        counts[part][0 if parameter.requires_grad else 1] += parameter.numel()
    return [PartCount(part, *numbers) for part, numbers in counts.items() if sum(numbers)]
