"""Constructors behind ``model.name``."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from opsin.models.shipped import TOWER_4
from opsin.training.models import scenes_llava


def test_a_tower_loads_under_the_names_of_both_versions_of_transformers(tmp_path: Path) -> None:
    shipped = load_file(str(resources.files("opsin.models") / "assets" / "scenes_vision_tower.safetensors"))
    assert all(name.startswith(TOWER_4) for name in shipped)
    save_file({k.removeprefix(TOWER_4): v for k, v in shipped.items()}, tmp_path / "newer.safetensors")
    as_shipped = scenes_llava().hf.model.vision_tower.state_dict()
    newer = scenes_llava(vision_tower=str(tmp_path / "newer.safetensors")).hf.model.vision_tower.state_dict()
    assert as_shipped.keys() == newer.keys() and all(torch.equal(newer[k], v) for k, v in as_shipped.items())
    tensor = "embeddings.patch_embedding.weight"
    (loaded,) = (v for k, v in newer.items() if k.endswith(tensor))
    assert torch.equal(loaded, shipped[TOWER_4 + tensor].float())
