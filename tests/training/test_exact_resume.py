"""Whole runs over data that no batch size divides: killed and resumed, with other workers, ranks and at epochs' ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opsin.training.config import load
from opsin.training.metrics_file import read_metrics
from opsin.training.train import train

import runs

SAMPLES = 45
"""Six batches of 8 an epoch, of which the last has 3 fillers."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.write_scenes(tmp_path_factory.mktemp("odd") / "scenes", samples=SAMPLES)


def changes(name: str, workers: int = 0, **more: Any) -> dict[str, Any]:
    return {"run_name": name, "max_duration": "2ep", "train_loader": {"num_workers": workers}, **more}


def test_a_run_uses_each_sample_once_an_epoch_and_resumes_with_other_workers(
    tmp_path: Path, odd: str
) -> None:
    whole = train(runs.loaded(tmp_path, odd, **changes("whole", save_interval="2ba")))
    config = runs.config_file(tmp_path, odd, "killed.yaml", **changes("killed", 2, save_interval="2ba"))
    runs.killed(config, tmp_path / "runs" / "killed", 9)  # in the second epoch
    resumed = train(load([config], ["train_loader.num_workers=1"]))
    assert [line["step"] for line in read_metrics(resumed.metrics)] == list(range(1, 13))
    assert runs.losses(resumed.path) == runs.losses(whole.path)
    # Blank rows are no unusable samples.
    assert read_metrics(whole.metrics)[-1]["data/skipped"] == 0
    assert not whole.skipped.is_file()


def test_a_run_killed_between_epochs_goes_on_with_the_next(tmp_path: Path, odd: str) -> None:
    """The only checkpoint is that of a finished epoch; stock Composer and Streaming would do the epoch again."""
    options = {"save_interval": "1ep"}
    whole = train(runs.loaded(tmp_path, odd, **changes("whole", **options)))
    config = runs.config_file(tmp_path, odd, "killed.yaml", **changes("killed", **options))
    runs.killed(config, tmp_path / "runs" / "killed", 8)
    resumed = train(load([config]))
    assert runs.losses(resumed.path) == runs.losses(whole.path)


@pytest.mark.slow
@pytest.mark.world
def test_a_run_killed_on_one_rank_goes_on_on_two(tmp_path: Path, odd: str, ranks: Any) -> None:
    options = {"save_interval": "2ba", "device_train_microbatch_size": 4}
    whole = train(runs.loaded(tmp_path, odd, **changes("whole", **options)))
    config = runs.config_file(tmp_path, odd, "killed.yaml", **changes("killed", **options))
    runs.killed(config, tmp_path / "runs" / "killed", 9)
    ranks.run("jobs:run_yaml", files=[config], timeout=240)
    expected = runs.losses(whole.path)
    assert runs.losses(tmp_path / "runs" / "killed") == pytest.approx(expected, rel=1e-4)
    states = json.dumps(read_metrics(tmp_path / "runs" / "killed" / "metrics.jsonl")[-1])
    assert '"data/skipped": 0' in states
