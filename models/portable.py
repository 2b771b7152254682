"""What transformers 5 writes, put so that transformers 4.57 reads it too.

4.57's own folders load in 5; the other way four things are lost, three of them without an error: the class of
the tokenizer, the image processor's file, the rotary base, and the names of a CLIP or SigLIP tower's weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_TOWER = "model.vision_tower."
_INNER = "vision_model."
_NESTED_TOWERS = ("clip_vision_model", "siglip_vision_model")
"""Vision models that hold another one called ``vision_model`` in 4.57, and are flat in 5."""


def portable_names(weights: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Weights under the names that both read: CLIP and SigLIP towers as 4.57 nests them."""
    vision = getattr(config, "vision_config", None)
    several = getattr(vision, "towers", None)  # of models/two_towers.py
    kinds = {_TOWER: getattr(vision, "model_type", None)}
    if isinstance(several, list):
        kinds = {f"{_TOWER}towers.{i}.": each.get("model_type") for i, each in enumerate(several)}
    for tower, kind in kinds.items():
        inner = tower + _INNER
        if kind in _NESTED_TOWERS and not any(name.startswith(inner) for name in weights):
            weights = {
                (inner + name.removeprefix(tower) if name.startswith(tower) else name): value
                for name, value in weights.items()
            }
    return weights


def make_portable(folder: Path, processor: Any) -> None:
    """Complete the files of a saved model and processor."""
    _edit(folder / "config.json", _rotary)
    if processor is not None:
        _edit(folder / "tokenizer_config.json", _tokenizer)
        if not (folder / "preprocessor_config.json").is_file():
            images = json.loads(processor.image_processor.to_json_string())
            images["processor_class"] = type(processor).__name__
            (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")


def _edit(path: Path, change: Any) -> None:
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        if change(content):
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer(content: dict[str, Any]) -> bool:
    """``TokenizersBackend`` is the name of ``PreTrainedTokenizerFast`` in 5, which knows the old one."""
    if content.get("tokenizer_class") != "TokenizersBackend":
        return False
    content["tokenizer_class"] = "PreTrainedTokenizerFast"
    return True


def _rotary(content: dict[str, Any]) -> bool:
    """``rope_parameters`` of 5 as ``rope_theta`` and ``rope_scaling`` as well; 4.57 would take its default base."""
    changed = False
    for part in (content, content.get("text_config")):
        rope = part.get("rope_parameters") if isinstance(part, dict) else None
        if part is None or not isinstance(rope, dict) or "rope_theta" not in rope:
            continue  # (one set of parameters a layer type has no form in 4.57)
        part.setdefault("rope_theta", rope["rope_theta"])
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        if scaling.get("rope_type", "default") != "default" or len(scaling) > 1:
            part.setdefault("rope_scaling", scaling)
        changed = True
    return changed
