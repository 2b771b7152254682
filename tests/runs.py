"""Small runs of the whole road for tests: tiny scenes, a tiny model, a dozen steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from opsin.training import cli
from opsin.training.config import Loaded, load

import forks

SMALL: dict[str, Any] = {
    "run_name": "small",
    "seed": 3,
    "model": {
        "name": "scenes_llava", "language_model": None, "vision_tower": None, "vision_width": 32, "hidden_size": 32, "layers": 2, "patch_size": 16,
    },
    "chat_template": "vicuna_v1",
    "system_prompt": "",
    "max_seq_len": 256,
    "global_train_batch_size": 8,
    "device_train_microbatch_size": 4,
    "max_duration": "12ba",
    "trainable": {"vision_tower": True, "mm_projector": True, "language_model": True},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "scheduler": {"name": "constant"},
    "train_loader": {"num_workers": 0},
    "progress_bar": False,
    "save_interval": "4ba",
}  # fmt: skip


def write_scenes(folder: Path, samples: int = 64, split: str = "uniform", stream: str = "vqa") -> str:
    """A dataset of scenes; returns its address."""
    from opsin.data.scenes import SceneConfig, write

    config = SceneConfig(objects=(1, 2), charts=0, sign=0, questions=2, kinds=("colour", "size"))
    write(folder, config=config, seed=5, split=split, stream=stream, samples=samples)
    return str(folder)


def config_file(folder: Path, data: str, name: str = "run.yaml", **changes: Any) -> str:
    """Write a YAML of a small run."""
    body = {**SMALL, "run_root": str(folder / "runs"), **changes}
    loader = {**SMALL["train_loader"], **body.get("train_loader", {})}
    loader.setdefault("dataset", {"remote": data})
    body["train_loader"] = loader
    path = folder / name
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return str(path)


def loaded(folder: Path, data: str, *arguments: str, **changes: Any) -> Loaded:
    """A checked configuration of a small run."""
    return load([config_file(folder, data, **changes)], arguments)


def losses(folder: Path) -> list[float]:
    """Losses of a run, by step."""
    from opsin.training.metrics_file import read_metrics

    return [
        line["loss/train/lm"] for line in read_metrics(folder / "metrics.jsonl") if "loss/train/lm" in line
    ]


def killed(config: str, folder: Path, lines: int) -> None:
    """Start a run and kill it (SIGKILL, workers too) when it has logged so many steps."""
    command = forks.Command(["train", config])
    metrics = folder / "metrics.jsonl"
    try:
        forks.when(command, lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= lines)
    finally:
        command.kill()


def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str
) -> tuple[int, str, str]:
    """``opsin data ...`` in this process: exit code, and what it said on both streams."""
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr("sys.argv", ["opsin", "data", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
        sys.exit(0)
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err
