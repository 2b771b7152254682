"""A whole run with all four methods, killed at several steps: each time it goes on with the losses it would have had."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from opsin.training.config import load
from opsin.training.metrics_file import read_metrics
from opsin.training.train import train

import forks
import runs

STEPS = 10
MODEL = {**runs.SMALL["model"], "patch_size": 8, "bidirectional_images": True}
METHODS: dict[str, Any] = {
    "ross": {"target": {"name": "pixels", "cell": 4}, "width": 64, "depth": 1, "draws": 2, "min_visible": 1},
    "l2t": {"template_source": "none", "lambda_instruction": 0.3, "on_text_only": True},
    "jarvis": {
        "target": {"name": "tower", "path": "scenes"}, "stages": ["instruct"], "text_loss": "masked", "log_interval": 1,
    },
    "vift": {
        "mixture": {"phases": [{"start": "0ba", "weights": {"captions": 1}}, {"start": "3ba", "weights": {"captions": 1, "text": 1}}], "ramp": "step"},
        "log_interval": 1,
    },
    "gradient_clipping_by_part": {"clipping_threshold": 1.0},
}  # fmt: skip
NOT_COMPARED = ("time/", "wall_clock", "throughput", "loss/train/seconds", "seconds")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("resumption")
    streams = {
        name: {"remote": runs.write_scenes(root / name, count, stream=kind), "kind": name.removesuffix("s")}
        for name, count, kind in (("captions", 40, "caption"), ("text", 24, "text"))
    }
    return {
        "root": root, "model": MODEL, "max_duration": f"{STEPS}ba", "save_interval": "1ba", "algorithms": METHODS,
        "train_loader": {"num_workers": 0, "dataset": {"remote": None, "streams": streams}},
        "save_num_checkpoints_to_keep": 2,
    }  # fmt: skip


def file(config: dict[str, Any], name: str) -> str:
    changes = {k: v for k, v in config.items() if k != "root"}
    return runs.config_file(config["root"], "", f"{name}.yaml", run_name=name, **changes)


def told(folder: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(NOT_COMPARED) and "time" not in k}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def snapshots(config: str, folder: Path, to: Path, steps: tuple[int, ...]) -> list[Path]:
    """Run a process and leave what a SIGKILL after each of some steps leaves on the disk; the last one really comes.

    At the others the process is stopped while its files are copied: a kill keeps what was written, and nothing else.
    """
    command = forks.Command(["train", config])
    metrics, made = folder / "metrics.jsonl", []
    try:
        for step in steps:
            forks.when(
                command,
                lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= step,  # noqa: B023
            )
            last = step == steps[-1]
            command.kill() if last else command.signal(signal.SIGSTOP)
            place = to / str(step)
            shutil.copytree(folder, place, symlinks=True)
            made.append(place)
            if not last:
                command.signal(signal.SIGCONT)
    finally:
        command.kill()
    return made


def test_a_run_with_all_methods_goes_on_wherever_it_is_killed(config: dict[str, Any], tmp_path: Path) -> None:
    whole = train(load([file(config, "whole")]))
    expected = told(whole.path)
    assert len(expected) == STEPS and {
        "loss/train/ross",
        "loss/train/jarvis",
        "l2t/loss_I",
        "vift/nll/text",
    } <= {key for line in expected for key in line}
    name = file(config, "killed")
    folder = config["root"] / "runs" / "killed"
    for place in snapshots(name, folder, tmp_path, (2, 4, 7)):
        shutil.rmtree(folder)
        shutil.copytree(place, folder, symlinks=True)
        assert not (folder / "model").exists()
        resumed = train(load([name]))
        assert told(resumed.path) == expected, place.name
        assert weights(folder) == weights(whole.path), place.name


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()
