"""JARVIS's kinds of targets: the reference's defaults, and where messages begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from opsin.algorithms.jarvis.targets import DINOV2, KINDS, check_target, make_target
from opsin.models.errors import UserError
from opsin.training import registry


def dino(folder: Path) -> str:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, mlp_ratio=2, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)  # fmt: skip
    Dinov2Model(config).save_pretrained(folder)
    CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return str(folder)


def test_defaults_are_the_references(tmp_path: Path) -> None:
    """DINOv2's last_hidden_state without its class token, not normalised, at the picture's own size."""
    path = dino(tmp_path)
    target: Any = make_target({"name": "features", "path": path})
    x = torch.rand(2, 3, 40, 48)
    net = Dinov2Model.from_pretrained(path).eval()
    with torch.no_grad():
        wanted = net((x - target.mean) / target.std).last_hidden_state[:, 1:]
    torch.testing.assert_close(target.moments(list(x), [(5, 6)] * 2), wanted.flatten(0, 1))
    assert target.moments(list(x), [(3, 3)] * 2).shape == (18, 16)  # moved to the model's grid
    assert " layer=last " in target.identity and " normalise=none " in target.identity
    given = {"name": "features", "path": path, "layer": -1, "normalise": "token", "resize": "pixels"}
    assert "resize" not in make_target(given).identity and " layer=-1 " in make_target(given).identity
    tower = make_target({"name": "tower", "path": "scenes"}).identity
    assert tower.startswith("tower CLIPVisionModel patch=8 layer=last") and "resize=features" in tower


def test_features_alone_are_those_of_dinov2_large() -> None:
    assert check_target("features")[1]["path"] == DINOV2 == "facebook/dinov2-large"
    assert check_target({"name": "features", "path": None})[1]["path"] == DINOV2
    assert "path" not in check_target({"name": "features", "timm": "test_vit"})[1]
    assert "path" not in check_target("tower")[1]
    assert sorted(KINDS) == ["features", "tower"]


@pytest.mark.parametrize("where", ["algorithms.jarvis.target", "--target"])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vae", ": unknown target 'vae'; known: features, tower"),
        ({"name": "towers"}, ".name: unknown target 'towers'; did you mean 'tower'?"),
        ("tower", ".path: a run folder, a model folder or scenes is needed"),
        ({"name": "tower", "path": "/no/such/run"}, ".path '/no/such/run': no such folder"),
        ({"name": "features", "path": "./nowhere"}, ".path './nowhere': no such folder"),
        ({"name": "features", "layr": -1}, ".layr: unknown key; did you mean 'layer'?"),
        ({"name": "features", "path": "a", "timm": "b"}, ".path: one of path"),
        (["features"], ": ['features']: use a name or a mapping with a name"),
    ],
)
def test_mistakes_begin_with_the_callers_place(spec: Any, message: str, where: str) -> None:
    with pytest.raises(UserError) as raised:
        make_target(spec, where)
    assert str(raised.value).startswith(where + message) and "\n" not in str(raised.value)


def test_the_registry_knows_them() -> None:
    assert registry.patch_targets.get("jarvis", "--method") is make_target
