"""A trained model from its folder, with the collator it was trained with: for the command line, reports and harnesses."""

from __future__ import annotations

from pathlib import Path

from ..data.chat import TEMPLATES
from ..data.collate import VLMCollator
from ..data.loader import build_encoder
from ..models.errors import UserError, nearest
from ..models.export import describe, load_model
from ..models.vlm import VisionLanguageModel

DEFAULT_TEMPLATE = "vicuna_v1"
"""Chat template of a model whose folder names none."""


def model_folder(source: str) -> str:
    """Where the model of a run folder lies; another folder or a hub name stays what it is.

    Raises:
        UserError: the run has not finished, or it is neither a run nor a model folder.
    """
    path = Path(source)
    if (path / "config.yaml").is_file():
        if not (path / "model" / "config.json").is_file():
            raise UserError(f"{path}: this run has not finished (no model)")
        return str(path / "model")
    if not (path / "config.json").is_file() and path.parent.is_dir() and path.parent != Path():
        known = [p.name for p in path.parent.iterdir() if p.is_dir()]
        raise UserError(f"{path}: no run and no model folder{nearest(path.name, known)}")
    return source


def open_folder(
    source: str, template: str | None = None, system_prompt: str | None = None
) -> tuple[VisionLanguageModel, VLMCollator]:
    """A model and its collator from a run folder, a model folder or a hub name.

    Args:
        source: where it lies.
        template: chat template; None: the one noted in the folder, else ``vicuna_v1``.
        system_prompt: None: the one noted in the folder, else the template's.

    Raises:
        UserError: nothing can be loaded from there, or an unknown template.
    """
    folder = model_folder(source)
    noted = describe(folder) if (Path(folder) / "config.json").is_file() else {}
    name = template or noted.get("chat_template") or DEFAULT_TEMPLATE
    system = noted.get("system_prompt") if system_prompt is None else system_prompt
    if name not in TEMPLATES:
        raise UserError(f"--chat-template '{name}': unknown{nearest(name, TEMPLATES)}")
    model = load_model(folder)
    length = getattr(model.hf.config.get_text_config(), "max_position_embeddings", 2048)
    encoder = build_encoder(
        model.processor, model.hf.config, template=name, system_prompt=system, max_seq_len=length
    )
    return model, VLMCollator(encoder)
