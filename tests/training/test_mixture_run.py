"""A mixture from a YAML: it switches while training, goes on after SIGKILL, and is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opsin.models.errors import UserError
from opsin.training.config import load
from opsin.training.train import train

import runs

SAMPLES = 24


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Questions about pictures, and text alone."""
    from opsin.data.scenes import SceneConfig, write

    root = tmp_path_factory.mktemp("streams")
    for name, kind in (("pictures", "vqa"), ("words", "text")):
        write(
            root / name, config=SceneConfig(objects=(1, 2), charts=0, sign=0), seed=3, split="uniform", stream=kind,
            samples=SAMPLES, size_limit=1 << 14,
        )  # fmt: skip
    return {name: {"remote": str(root / name)} for name in ("pictures", "words")}


def changes(name: str, streams: dict[str, Any], workers: int = 0, **more: Any) -> dict[str, Any]:
    mixture = {
        "batches": "single",
        "phases": [
            {"start": "0ba", "weights": {"pictures": 1}},
            {"start": "0.5dur", "weights": {"pictures": 1, "words": 1}},
        ],
    }
    dataset = {"remote": None, "streams": streams, "mixture": mixture}
    return {
        "run_name": name, "max_duration": "2ep", "save_interval": "2ba",
        "train_loader": {"num_workers": workers, "dataset": dataset}, **more,
    }  # fmt: skip


def test_a_run_switches_its_mixture_and_goes_on_after_sigkill(
    tmp_path: Path, scenes: str, streams: dict[str, Any]
) -> None:
    whole = train(runs.loaded(tmp_path, scenes, **changes("whole", streams)))
    assert len(runs.losses(whole.path)) == 2 * (2 * SAMPLES // 8)
    config = runs.config_file(tmp_path, scenes, "killed.yaml", **changes("killed", streams, 2))
    runs.killed(config, tmp_path / "runs" / "killed", 9)
    resumed = train(load([config], ["train_loader.num_workers=1"]))
    assert runs.losses(resumed.path) == runs.losses(whole.path)


def test_a_mixture_that_is_none_is_one_line(tmp_path: Path, scenes: str, streams: dict[str, Any]) -> None:
    mixed = changes("wrong", streams)
    for key, value, said in (
        ("phases", [{"start": "0ba", "weights": {"picture": 1}}], "no such stream; did you mean 'pictures'"),
        ("batches", "singel", "did you mean 'single'"),
    ):
        wrong = {**mixed, "train_loader": {"dataset": {**mixed["train_loader"]["dataset"]}}}
        wrong["train_loader"]["dataset"]["mixture"] = {
            **mixed["train_loader"]["dataset"]["mixture"],
            key: value,
        }
        with pytest.raises(UserError, match=said) as error:
            train(runs.loaded(tmp_path, scenes, **wrong))
        assert "train_loader.dataset" in str(error.value) and "\n" not in str(error.value)
    alone = {**mixed, "train_loader": {"dataset": {"mixture": {"weights": {"default": 1}}}}}
    with pytest.raises(UserError, match="there is nothing to mix; name streams"):
        train(runs.loaded(tmp_path, scenes, **alone))
