"""Starting from a checkpoint: weights and nothing else, whole or not at all."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from opsin.models.errors import UserError
from opsin.models.vlm import VisionLanguageModel
from opsin.training.init_weights import checkpoint_weights, load_weights
from opsin.training.train import train

import jobs
import runs
import zoo
from ranks import RankPool

HEAD = [("methods:MeanColour", {})]


def _fresh(family: str = "llava", seed: int = 9) -> VisionLanguageModel:
    built = zoo.build(family, seed=seed)
    return VisionLanguageModel(built.hf, built.processor)


def _saved(folder: Path) -> dict:
    return jobs.train(
        steps=2, algorithms=HEAD, trainer={"save_folder": str(folder), "save_filename": "saved.pt"}
    )


@pytest.mark.parametrize("heads", ["keep", "drop"])
def test_a_checkpoint_gives_its_weights_and_says_so(tmp_path: Path, heads: str) -> None:
    trained = _saved(tmp_path)["weights"]
    model, said = _fresh(), io.StringIO()
    load_weights(model, tmp_path / "saved.pt", heads, Console(file=said, width=300))
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name])
    stored = {k for k in trained if k.startswith("net.auxiliary.")}
    assert stored
    kept = {f"net.auxiliary.{m}.{k}" for m, tensors in model.saved_heads.items() for k in tensors}
    assert kept == (stored if heads == "keep" else set())
    assert "tensors matched" in said.getvalue()


def test_a_checkpoint_of_another_model_is_refused_whole(tmp_path: Path) -> None:
    _saved(tmp_path)
    model = _fresh("qwen2_5_vl")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="tensors of the model are not in it"):
        load_weights(model, tmp_path / "saved.pt", "keep", Console(quiet=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="no checkpoint of Composer"):
        checkpoint_weights(tmp_path / "other.pt")


@pytest.mark.world
def test_a_sharded_checkpoint_gives_whole_tensors(tmp_path: Path, ranks: RankPool) -> None:
    options = {
        "steps": 2,
        "algorithms": HEAD,
        "trainer": {"save_folder": str(tmp_path), "save_filename": "saved"},
    }
    sharded = ranks.run("jobs:train", parallel="fsdp2", **options)[0]
    [folder] = [p.parent for p in tmp_path.glob("**/.metadata")]
    weights = checkpoint_weights(folder)
    assert set(weights) == set(sharded["weights"])
    assert all(torch.equal(v, sharded["weights"][k]) for k, v in weights.items())
    load_weights(_fresh(), folder, "keep", Console(quiet=True))


def test_a_run_starts_from_a_checkpoint(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    scenes = runs.write_scenes(tmp_path_factory.mktemp("scenes") / "data")
    first = train(runs.loaded(tmp_path, scenes, max_duration="4ba"))
    saved = first.checkpoints("instruct") / "latest-rank0.pt"
    second = train(
        runs.loaded(
            tmp_path, scenes, f"init_from={saved}", "run_name=second", "optimizer.lr=0", max_duration="1ba"
        )
    )
    from opsin.models.export import load_model

    a, b = load_model(first.model).state_dict(), load_model(second.model).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_stage_begun_on_another_stack_is_refused(tmp_path: Path) -> None:
    scenes = runs.write_scenes(tmp_path / "data")
    first = train(runs.loaded(tmp_path, scenes, max_duration="4ba"))
    (first.stage("instruct") / "done.json").unlink()  # as if it had been stopped
    stack = first.path / "stack.json"
    stack.write_text(json.dumps({**json.loads(stack.read_text()), "transformers": "3.1.0"}))
    with pytest.raises(UserError, match=r"begun with transformers 3.1.0.*opsin export.*init_from"):
        train(runs.loaded(tmp_path, scenes, max_duration="4ba"))
