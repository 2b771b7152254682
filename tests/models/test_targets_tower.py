"""The vision tower of a model that lies here as a target."""

from __future__ import annotations

import gc
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from opsin.models.assemble import llava_from_parts
from opsin.models.errors import UserError
from opsin.models.export import export_model
from opsin.models.shipped import SCENES_TOWER, scenes_tower
from opsin.models.targets import make_target as make_of
from opsin.models.towers import TokenTower
from opsin.models.vlm import VisionLanguageModel
from opsin.training.models import scenes_llava

import zoo

KINDS = {"tower": "opsin.models.targets.tower:TowerTarget"}
PLAIN: dict[str, Any] = {"name": "tower", "normalise": "none", "layer": "last"}


def make_target(**more: Any) -> Any:
    return make_of({**PLAIN, **more}, KINDS, "algorithms.method.target")


def exported(built: Any, folder: Path) -> str:
    return str(export_model(VisionLanguageModel(built.hf, built.processor), folder))


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("layer", ["last", -2])
def test_the_tower_of_an_export_is_the_models_own(family: str, layer: Any, tmp_path: Path) -> None:
    built = zoo.build(family)
    target = make_target(path=exported(built, tmp_path / "model"), layer=layer)
    processor = built.processor.image_processor
    assert target.mean.flatten().tolist() == pytest.approx(processor.image_mean)
    assert target.std.flatten().tolist() == pytest.approx(processor.image_std)
    assert (target.cell, target.dim, target.fixed) == (4, 24, False)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        said = built.hf.eval().model.vision_tower((x - target.mean) / target.std, output_hidden_states=True)
    hidden = said.last_hidden_state if layer == "last" else said.hidden_states[-2]
    torch.testing.assert_close(target.encode(x, (4, 4)), hidden[:, 1:])
    assert target.identity.startswith("tower CLIPVisionModel patch=4")
    assert target.encode(torch.rand(1, 3, 12, 20), (3, 5)).shape == (1, 15, 24)
    moved = make_target(path=str(tmp_path / "model"), resize="features", image_size=32)
    assert moved.moments([torch.rand(3, 20, 16)], [(4, 4)]).shape == (16, 24)


def test_a_run_folder_means_its_model(tmp_path: Path) -> None:
    folder = exported(zoo.build("llava"), tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("run_name: run\n")
    assert make_target(path=str(tmp_path / "run")).identity == make_target(path=folder).identity
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"method\.target\.path .*this run has not finished"):
        make_target(path=str(tmp_path / "run"))


def test_names_and_shards_of_other_versions_are_found(tmp_path: Path) -> None:
    """Hub folders say `vision_tower.vision_model.` or `model.vision_tower.`, in several files or in one."""
    folder = Path(exported(zoo.build("llava"), tmp_path / "model"))
    identity = make_target(path=str(folder)).identity
    weights = load_file(folder / "model.safetensors")
    for start in ("vision_tower.vision_model.", "model.vision_tower.vision_model.", "model.vision_tower."):
        found = {k: k.partition("vision_tower.")[2].removeprefix("vision_model.") for k in weights}
        renamed = {start + found[k] if found[k] else k: v for k, v in weights.items()}
        assert sum(name.startswith(start) for name in renamed) > 20
        save_file(renamed, folder / "model.safetensors")
        assert make_target(path=str(folder)).identity == identity
    built = zoo.build("llava")
    built.hf.save_pretrained(tmp_path / "shards", max_shard_size="30kB")
    built.processor.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert make_target(path=str(tmp_path / "shards")).identity == identity


def test_only_the_tower_is_read_and_kept(tmp_path: Path) -> None:
    folder = Path(exported(zoo.build("llava"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "vision_tower" in k}, folder / "model.safetensors")
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.nn.Module)}
    target = make_target(path=str(folder))
    gc.collect()
    new = [o for o in gc.get_objects() if isinstance(o, torch.nn.Module) and id(o) not in before]
    assert {id(m) for m in new} == {id(m) for m in target.teacher.module.modules()}


def test_siglip_and_token_towers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = LlamaForCausalLM(LlamaConfig(**zoo._text()))
    siglip = SiglipVisionModel(
        SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                           image_size=16, patch_size=4)
    )  # fmt: skip
    token = TokenTower.from_timm("test_resnet", None, image_size=64, stages=("head",), standardise=True)
    token.set_statistics(torch.rand(token.config.hidden_size), torch.rand(token.config.hidden_size) + 0.1)
    processor = zoo.build("llava").processor
    for name, tower in (("siglip", siglip), ("token", token)):
        hf = llava_from_parts(tower, text, image_token_id=3)
        path = exported(zoo.Built(hf, processor), tmp_path / name)
        target = make_target(path=path)
        side = tower.config.image_size
        x = torch.rand(2, 3, side, side)
        grid = (side // tower.config.patch_size,) * 2
        with torch.no_grad():
            said = tower.eval()(pixel_values=(x - target.mean) / target.std)
        torch.testing.assert_close(target.encode(x, grid), said.last_hidden_state)
        assert target.fixed == (name == "token")
        assert target.moments([torch.rand(3, 20, 30)], [(3, 5)]).shape == (15, tower.config.hidden_size)
        # The tower alone, in a folder of its own.
        tower.save_pretrained(tmp_path / f"{name}-alone")
        processor.image_processor.save_pretrained(tmp_path / f"{name}-alone")
        spec = {**PLAIN, "name": "features", "path": str(tmp_path / f"{name}-alone")}
        alone: Any = make_of(spec, {"features": "opsin.models.targets.features:FeatureTarget"}, "target")
        assert alone.fixed == target.fixed and alone.dim == tower.config.hidden_size
        with torch.no_grad():
            said = tower(pixel_values=(x - alone.mean) / alone.std).last_hidden_state
        torch.testing.assert_close(alone.encode(x, grid), said)


def test_the_tower_that_ships() -> None:
    target = make_target(path="scenes")
    assert (target.cell, target.dim, target.fixed) == (8, 96, False)
    model = scenes_llava()
    x = torch.rand(2, 3, 64, 64)
    processor = model.processor.image_processor
    assert target.mean.flatten().tolist() == list(processor.image_mean)
    assert target.std.flatten().tolist() == list(processor.image_std)
    with torch.no_grad():
        said = model.hf.eval().model.vision_tower((x - 0.5) / 0.25).last_hidden_state
    torch.testing.assert_close(target.encode(x, (8, 8)), said[:, 1:])
    # the sizes that ship are those that `scenes_llava` has by default
    known = inspect.signature(scenes_llava).parameters
    names = {"image_size": "image_size", "patch_size": "patch_size", "width": "vision_width", "layers": "vision_layers"}  # fmt: skip
    assert {k: known[v].default for k, v in names.items()} == SCENES_TOWER
    state = torch.random.get_rng_state()
    assert not scenes_tower().training and torch.equal(torch.random.get_rng_state(), state)


def test_what_has_no_such_tower_is_refused_in_one_line(tmp_path: Path) -> None:
    qwen = tmp_path / "qwen"
    zoo.build("qwen2_5_vl").hf.save_pretrained(qwen)
    LlamaForCausalLM(LlamaConfig(**zoo._text())).save_pretrained(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    cut = Path(exported(zoo.build("llava"), tmp_path / "cut"))
    weights = load_file(cut / "model.safetensors")
    lost = next(name for name in weights if "patch_embedding" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, cut / "model.safetensors")
    pickled = Path(exported(zoo.build("llava"), tmp_path / "pickled"))
    torch.save(weights, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for path, message in (
        (qwen, "the vision tower of a qwen2_5_vl does not give one map a picture"),
        (tmp_path / "text", "a llama has no vision tower; use features for a vision model"),
        (tmp_path / "none", "no such folder; give a run folder, a model folder or scenes"),
        (tmp_path / "empty", "no run folder, no model folder"),
        (cut, "the weights have no"),
        (pickled, "no model.safetensors there; weights are read from safetensors only"),
    ):
        with pytest.raises(UserError) as raised:
            make_target(path=str(path))
        assert str(raised.value).startswith(f"algorithms.method.target.path '{path}': ")
        assert message in str(raised.value) and "\n" not in str(raised.value)
    for more, message in (
        ({}, "path: a run folder, a model folder or scenes is needed"),
        ({"path": "scenes", "layer": 9}, "layer: 9; there are 0 to 3"),
        ({"path": "scenes", "timm": "x"}, "timm: unknown key"),
    ):
        with pytest.raises(UserError, match=rf"^algorithms\.method\.target\.{message}"):
            make_target(**more)
