"""Two vision towers side by side: what each sees, the common grid, what is trained, what an export needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText

from opsin.models.errors import UserError
from opsin.models.export import export_model, load_model, own_classes
from opsin.models.parts import count_parameters, set_trainable
from opsin.models.two_towers import TwoTowers
from opsin.models.vlm import VisionLanguageModel
from opsin.training.finished import export_run
from opsin.training.models import llava_from_parts
from opsin.training.train import train

import runs
from part_folders import write_text, write_tower

SMALL, LARGE = {"image_size": 64, "patch_size": 8}, {"image_size": 80, "patch_size": 16}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    write_tower(root / "clip", "clip", **SMALL)
    write_tower(root / "siglip", "siglip", image_size=62, patch_size=8)  # 7x7 patches of 56 of its 62 pixels
    write_tower(root / "dinov2", "dinov2", **LARGE)
    write_text(root / "llama", "llama")
    return root


def two(parts: Path, *names: Any, **options: Any) -> VisionLanguageModel:
    specs = [str(parts / n) if isinstance(n, str) else {**n, "name": str(parts / n["name"])} for n in names]
    return llava_from_parts(str(parts / "llama"), vision_towers=specs, **options)


@torch.no_grad()
def test_the_first_towers_features_come_first_and_unchanged(parts: Path) -> None:
    model = two(parts, "clip", "siglip")
    tower: Any = model.hf.model.vision_tower
    assert isinstance(tower, TwoTowers)
    config = tower.config
    assert (config.image_size, config.patch_size, config.grid, config.hidden_size) == (64, 8, (8, 8), 64)
    assert (config.layers, config.prefixes) == ([-2, -2], [1, 0])
    alone: Any = llava_from_parts(str(parts / "llama"), str(parts / "clip")).hf.model.vision_tower
    pixels = torch.rand(2, 3, 64, 64)
    tokens = tower(pixels).hidden_states[-1]
    assert tokens.shape == (2, 64, 64)
    assert torch.equal(tokens[..., :32], alone(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    other: Any = llava_from_parts(str(parts / "llama"), str(parts / "siglip")).hf.model.vision_tower
    seen = torch.nn.functional.interpolate(pixels, (56, 56), mode="bicubic", antialias=True)
    own = other(seen, output_hidden_states=True).hidden_states[-2].transpose(1, 2).unflatten(2, (7, 7))
    own = torch.nn.functional.interpolate(own, (8, 8), mode="bilinear", antialias=True).flatten(2)
    assert torch.allclose(tokens[..., 32:], own.transpose(1, 2), atol=1e-5)


@torch.no_grad()
def test_each_tower_gets_its_own_colours(parts: Path) -> None:
    plain = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    model = two(parts, "clip", {"name": "clip", **plain})
    tower: Any = model.hf.model.vision_tower
    white = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    pixels = model.processor.image_processor(images=[white], return_tensors="pt")["pixel_values"]
    tokens = tower(pixels).hidden_states[-1]
    expected = tower.towers[1](torch.ones(1, 3, 64, 64), output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.allclose(tokens[..., 32:], expected, atol=1e-4)
    assert not torch.allclose(tokens[..., :32], expected, atol=1e-2)


def test_a_larger_second_tower_makes_pictures_larger(parts: Path) -> None:
    model = two(parts, "clip", "dinov2")
    config = model.hf.config.vision_config
    assert (config.image_size, config.patch_size, config.grid) == (80, 10, (8, 8))
    pixels = model.processor.image_processor(images=[Image.new("RGB", (90, 40))], return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 80, 80)
    features = model.anatomy.image_features(model.hf, {"pixel_values": pixels["pixel_values"]})
    assert features.flatten(0, -2).shape[0] == 64 == model.hf.config.image_seq_length


def test_both_are_trained_or_frozen_as_one_part(parts: Path) -> None:
    model = two(parts, "clip", "dinov2")
    counts = {c.part: c for c in count_parameters(model)}
    both = sum(p.numel() for p in model.hf.model.vision_tower.parameters())
    assert counts["vision_tower"].trainable == both
    set_trainable(model, {"vision_tower": True, "mm_projector": True, "language_model": False})
    named = dict(model.hf.model.vision_tower.named_parameters())
    for index in (0, 1):
        of_one = {n: p.requires_grad for n, p in named.items() if n.startswith(f"towers.{index}.")}
        assert any(of_one.values()) and not all(of_one.values())  # the last layer of each is read by nobody
    set_trainable(model, {"vision_tower": False})
    model.train()
    assert not any(p.requires_grad for p in named.values())
    assert not any(m.training for m in model.hf.model.vision_tower.modules())


def test_meta_and_mistakes(parts: Path) -> None:
    model = two(parts, "clip", "dinov2", meta=True)
    assert all(p.is_meta for p in model.parameters())
    real = two(parts, "clip", "dinov2")
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    with pytest.raises(UserError, match=r"model.vision_towers: needs two or more"):
        two(parts, "clip")
    with pytest.raises(UserError, match=r"model.vision_towers.1: cannot load a vision tower"):
        two(parts, "clip", "nothing")
    with pytest.raises(UserError, match=r"model.vision_towers.0.layr: unknown key; did you mean 'layer'"):
        two(parts, {"name": "clip", "layr": 1}, "siglip")
    with pytest.raises(UserError, match="needs either vision_tower or vision_towers"):
        llava_from_parts(str(parts / "llama"))


TEACHER = {"name": "features", "timm": "test_vit", "weights": None, "mean": [0.5] * 3, "std": [0.25] * 3}


def run(parts: Path, tmp_path: Path, dataset: dict[str, Any], algorithms: dict[str, Any]) -> Path:
    """Two steps from parts, by YAML; the run's folder."""
    towers = [str(parts / "clip"), {"name": str(parts / "dinov2"), "layer": -1}]
    loaded = runs.loaded(
        tmp_path,
        "",
        model={
            "name": "llava_from_parts",
            "language_model": str(parts / "llama"),
            "vision_towers": towers,
            "image_aspect_ratio": "pad",
        },
        train_loader={"dataset": dataset},
        max_duration="2ba",
        global_train_batch_size=4,
        max_seq_len=400,
        algorithms=algorithms,
        save_interval="2ba",
    )
    return train(loaded, Console(quiet=True)).path


def test_a_run_with_methods_and_its_export(parts: Path, tmp_path: Path) -> None:
    data = runs.write_scenes(tmp_path / "data", samples=16)
    methods = {
        "l2t": {"lambda_instruction": 0.5},
        "ross": {"target": "pixels", "width": 32, "draws": 1},
        "jarvis": {"target": TEACHER, "stages": ["instruct"], "layer": 1},
    }
    folder = run(parts, tmp_path, {"remote": data}, methods)
    with (tmp_path / "said").open("w") as file:
        export_run(folder, tmp_path / "export", Console(file=file, width=300))
    text, out = (tmp_path / "said").read_text(), tmp_path / "export"
    assert "plain transformers gives the same logits" in text
    assert "has classes of Opsin's: `import opsin.models.two_towers` before plain" in text
    assert "`import opsin.models.two_towers` first" in (out / "README.md").read_text()
    ours, plain = load_model(out), AutoModelForImageTextToText.from_pretrained(out)
    pairs = zip(ours.hf.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow  # a process that imports all of transformers
@pytest.mark.parametrize(
    "named", [{"vision_towers": ("clip", "dinov2")}, {"vision_tower": "clip", "mm_projector": "linear"}]
)
def test_the_import_that_an_export_names_is_enough(
    parts: Path, tmp_path: Path, named: dict[str, Any]
) -> None:
    spec = {k: [str(parts / n) for n in v] if isinstance(v, tuple) else v for k, v in named.items()}
    if "vision_tower" in spec:
        spec["vision_tower"] = str(parts / spec["vision_tower"])
    model = llava_from_parts(str(parts / "llama"), **spec)
    out = export_model(model, tmp_path / "out")
    code = (
        f"import sys, {own_classes(model.hf.config)[0]}\n"
        "from transformers import AutoModelForImageTextToText as A\n"
        "model, info = A.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "print(type(model).__name__, type(model.model.vision_tower).__name__, sorted(info['missing_keys']))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    expected = (
        "LlavaForConditionalGeneration TwoTowers []"
        if "vision_towers" in named
        else "OwnLlava CLIPVisionModel []"
    )
    assert done.stdout.strip() == expected, done.stderr[-2000:]


def test_a_run_of_captions_and_text(parts: Path, tmp_path: Path) -> None:
    streams = {
        "captions": {
            "remote": runs.write_scenes(tmp_path / "c", samples=16, stream="caption"),
            "kind": "caption",
        },
        "text": {"remote": runs.write_scenes(tmp_path / "t", samples=16, stream="text"), "kind": "text"},
    }
    folder = run(
        parts, tmp_path, {"streams": streams}, {"vift": {"mixture": {"weights": {"captions": 1, "text": 1}}}}
    )
    assert len(runs.losses(folder)) == 2 and all(map(np.isfinite, runs.losses(folder)))
