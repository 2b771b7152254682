"""Features of the vision tower of a vision-language model that lies here: a teacher that needs no download."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel

from ..anatomy import anatomy_of
from ..errors import UserError
from ..shipped import TOWER_4, scenes_tower
from ..tiny import IMAGE_MEAN, IMAGE_STD
from .features import ReaderTarget, check_layer
from .frozen import WHERE, one_line
from .readers import TransformerReader, colours

SCENES = "scenes"
"""A ``path``: the tower that ships with Opsin."""

_FAMILIES = "CLIP, SigLIP, DINOv2 or a token tower of opsin"


class TowerTarget(ReaderTarget):
    """One feature a patch, of the frozen vision tower of a vision-language model.

    Args:
        path: folder of a run (its ``model``), of a stage's model, or of any Hugging Face vision-language model whose
            tower has CLIP's interface; only the tower's weights are read, from safetensors. ``scenes``: the tower
            that ships with Opsin (a folder of that name is ``./scenes``).
        mean, std: of a colour, three each; default: those of the model's image processor.
        layer, normalise, antialias, resize, image_size, dtype: as of
            :class:`~opsin.models.targets.features.FeatureTarget` with ``path``.

    Raises:
        UserError: no such model or layer, or a tower that does not give one map a picture (Qwen2-VL's).
    """

    def __init__(
        self,
        path: str | None = None,
        layer: int | str = -1,
        normalise: str = "token",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        antialias: bool = False,
        resize: str = "pixels",
        image_size: int | None = None,
        dtype: str = "float32",
    ):
        if path is None:
            raise UserError(f"{WHERE}.path: a run folder, a model folder or {SCENES} is needed")
        check_layer(layer)
        reader = TowerReader(str(path))
        super().__init__("tower", reader, layer, normalise, mean, std, antialias, resize, image_size, dtype)


class TowerReader(TransformerReader):
    """The vision tower of a vision-language model; see :class:`TowerTarget`."""

    def __init__(self, path: str):
        source = f"{WHERE}.path '{path}'"
        if path == SCENES:
            tower = scenes_tower()
            super().__init__(tower, tower.config, source, IMAGE_MEAN, IMAGE_STD)
        else:
            folder = _model_folder(path, source)
            tower = _load(folder, source)
            super().__init__(tower, tower.config, source, *colours(folder))


def _model_folder(path: str, source: str) -> Path:
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "config.yaml").is_file():
        raise UserError(f"{source}: this run has not finished (no model)")
    if not folder.is_dir():
        raise UserError(f"{source}: no such folder; give a run folder, a model folder or {SCENES}")
    raise UserError(f"{source}: no run folder, no model folder (no config.json)")


def _load(folder: Path, source: str) -> nn.Module:
    """The tower alone, in float32: the other weights are never read."""
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except Exception as error:  # a dozen kinds
        raise UserError(f"{source}: cannot be loaded ({one_line(error)})") from error
    if getattr(config, "vision_config", None) is None:
        raise UserError(
            f"{source}: a {config.model_type} has no vision tower; use features for a vision model"
        )
    try:
        paths = anatomy_of(SimpleNamespace(config=config)).vision_tower
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    vision = config.vision_config
    sizes = [getattr(vision, key, None) for key in ("image_size", "patch_size")]
    if len(paths) != 1 or not all(isinstance(size, int) for size in sizes):
        raise UserError(
            f"{source}: the vision tower of a {config.model_type} does not give one map a picture; a model with "
            f"{_FAMILIES} is needed"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced
            tower = AutoModel.from_config(vision).float()  # whatever the configuration says
        weights = dict(_weights(folder, paths[0].rpartition(".")[2] + "."))
    except Exception as error:  # an architecture that transformers does not know, a file that is cut off
        raise UserError(f"{source}: cannot be loaded ({one_line(error)})") from error
    here = {name.removeprefix(TOWER_4): name for name in tower.state_dict()}
    found = {here[name]: value for name, value in weights.items() if name in here}
    missing = sorted(set(here.values()) - set(found))
    if missing:
        raise UserError(
            f"{source}: the weights have no '{missing[0]}' of the tower ({len(missing)} are missing)"
        )
    try:
        tower.load_state_dict(found)
    except RuntimeError as error:
        raise UserError(f"{source}: {str(error).splitlines()[-1].strip()}") from error
    return tower


def _weights(folder: Path, part: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of one part of a model, by their names inside it; transformers 4's ``vision_model.`` left out.

    Names are found by the part's own name, because what stands before it changed between versions (``model.``).
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for name, file in listed.items() if part in name})
    else:
        files = ["model.safetensors"]
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} there; weights are read from safetensors only")
        with safe_open(folder / name, "pt") as file:
            for stored in file.keys():  # noqa: SIM118
                before, found, inside = stored.partition(part)
                if found and before in ("", "model."):
                    yield inside.removeprefix(TOWER_4), file.get_tensor(stored)
