"""Weights of a Composer checkpoint as the start of a stage (``init_from: {path: ….pt}``): weights, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..models.adapters import merged
from ..models.errors import UserError
from ..models.export import split_heads
from ..models.vlm import VisionLanguageModel
from .checkpoints import read

_HF, _HEADS = "net.hf.", "net.auxiliary."


def is_checkpoint(path: Path) -> bool:
    """A Composer checkpoint: one file, or the folder of a sharded one."""
    return path.is_file() or (path / ".metadata").is_file()


def checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, whole, adapters merged, by Composer's names; no code of the file is run.

    Args:
        path: ``….pt`` (DDP, one process), or a folder with ``.metadata`` (FSDP2).

    Raises:
        UserError: not a checkpoint of Composer, or one that would run code.
    """
    body = read(path)
    try:
        state: dict[str, Any] = body["state"]["model"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: no checkpoint of Composer (it holds no state.model)") from error
    return merged({name.removeprefix("module."): value for name, value in state.items()})


def load_weights(model: VisionLanguageModel, path: Path, heads: str, console: Console) -> None:
    """Put a checkpoint's weights into ``model`` and say what matched, was dropped and is new.

    Args:
        model: built as the YAML says, heads not attached yet.
        path: see :func:`checkpoint_weights`.
        heads: ``keep`` hands the methods' heads on, to be taken when a method attaches its own; ``drop``
            and ``new`` leave them out.

    Raises:
        UserError: a tensor of the Hugging Face model is not in the checkpoint, or has another shape.
    """
    weights = checkpoint_weights(path)
    stored = {k.removeprefix(_HF): v for k, v in weights.items() if k.startswith(_HF)}
    wanted = {k: v.shape for k, v in model.hf.state_dict().items()}
    missing = sorted(k for k in wanted if k not in stored)
    other = sorted(k for k in wanted if k in stored and stored[k].shape != wanted[k])
    if missing or other:
        raise UserError(
            f"init_from '{path}': {len(missing)} tensors of the model are not in it and {len(other)} have another "
            f"shape, such as {(missing + other)[0]}; is it of another model, or of another major version of transformers?"
        )
    model.hf.load_state_dict({k: stored[k] for k in wanted})
    auxiliary = {k.removeprefix(_HEADS): v for k, v in weights.items() if k.startswith(_HEADS)}
    if heads == "keep":
        model.saved_heads = split_heads(auxiliary)
    dropped = len(stored) - len(wanted) + (0 if heads == "keep" else len(auxiliary))
    console.print(
        f"init_from {path}: {len(wanted)} tensors matched, {dropped} dropped, "
        f"{len(auxiliary) if heads == 'keep' else 0} of methods' heads kept for them"
    )
