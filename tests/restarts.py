"""Runs with all four methods on, cut back to an earlier checkpoint as if they had been killed there, and resumed."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback

import runs

METHODS = ("ross", "l2t", "jarvis", "vift")
LOSSES = ("loss/train/total", "loss/train/lm", "loss/train/ross", "loss/train/jarvis")


SAMPLES, CAPTIONS = 64, 40
"""Captions and text-only instructions: 8 batches of 8 an epoch, each sample once."""
MIXTURE = {"weights": {"captions": CAPTIONS, "text": SAMPLES - CAPTIONS}, "batches": "mixed"}
STEPS = 10
"""Into the second epoch; a checkpoint every second step, and all are kept."""


@functools.cache
def folder() -> Path:
    """Where the data and the uninterrupted run are, for all tests of this process."""
    path = Path(tempfile.mkdtemp(prefix="opsin-restarts-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def data() -> dict[str, str]:
    """Addresses by stream."""
    made = {"captions": ("caption", CAPTIONS), "text": ("text", SAMPLES - CAPTIONS)}
    return {
        name: runs.write_scenes(folder() / "data" / name, n, stream=stream)
        for name, (stream, n) in made.items()
    }


@functools.cache
def one() -> Path:
    """The run that nobody stopped, in one process."""
    (folder() / "one").mkdir()
    return Path(run([config(folder() / "one")]))


def config(at: Path, name: str = "four", **more: Any) -> str:
    """The YAML of a run with all four methods; ``more`` changes it."""
    return runs.config_file(at, "", f"{name}.yaml", **four(data(), name, **more))


def four(streams: dict[str, str], name: str = "four", **more: Any) -> dict[str, Any]:
    """Changes of a small run: all four methods really at work, heads and all.

    L2T learns the instructions of the text stream, which is the only place where ViFT leaves some.
    """
    kinds = {"captions": "caption", "text": "text"}
    dataset = {"streams": {n: {"remote": streams[n], "kind": k} for n, k in kinds.items()}, "remote": None}
    return {
        "run_name": name,
        "model": {**runs.SMALL["model"], "patch_size": 8, "bidirectional_images": True},
        "max_duration": f"{STEPS}ba",
        "save_interval": "2ba",
        "save_num_checkpoints_to_keep": -1,
        "algorithms": {
            "ross": {"target": "pixels", "width": 32, "depth": 1, "draws": 1, "stages": ["instruct"]},
            "l2t": {"lambda_instruction": 0.5, "on_text_only": True},
            "jarvis": {"target": {"name": "tower", "path": "scenes"}, "weight": 0.5, "stages": ["instruct"]},
            "vift": {"mixture": MIXTURE, "log_interval": 1},
        },
        "callbacks": {"served": {}},
        "train_loader": {"num_workers": 0, "dataset": dataset},
        **more,
    }  # fmt: skip


def cut_back(whole: Path, to: Path, batch: int) -> Path:
    """A copy of a run that was killed after the checkpoint of ``batch``: nothing later is there but log lines."""
    shutil.copytree(
        whole,
        to,
        symlinks=True,
        ignore=shutil.ignore_patterns("model", "done.json", "summary.json", "served"),
    )
    (checkpoints,) = (to / "checkpoints").iterdir()
    kept = {}
    for path in checkpoints.iterdir():
        if path.is_symlink():
            path.unlink()
            continue
        number = int(path.name.removesuffix("-rank0.pt").rsplit("ba", 1)[1])
        kept[number] = path
        if number > batch:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (checkpoints / "latest-rank0.pt").symlink_to(kept[batch].name)
    return to


def told(folder: Path, *keys: str) -> list[list[float | None]]:
    """Numbers of each step of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(key) for key in keys or LOSSES] for line in lines if "loss/train/lm" in line]


def same(got: list[list[float | None]], expected: list[list[float | None]], tolerance: float) -> None:
    """The numbers of all steps, within ``tolerance`` of each one's size."""
    assert len(got) == len(expected)
    for number, (a, b) in enumerate(zip(got, expected, strict=True), 1):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), f"step {number}"


class Served(Callback):
    """Writes down what each step was given and what dice would have shown, a file a rank.

    ``resaved``: where a checkpoint is written as soon as one was loaded.
    """

    folder_name = "served"

    def __init__(self, folder: str = "served"):
        self.folder = Path(folder)

    def after_load(self, state: Any, logger: Any) -> None:
        from composer.utils import checkpoint

        if int(state.timestamp.batch):
            checkpoint.save_checkpoint(state, str(self.folder / "resaved" / "whole.pt"))

    def after_dataloader(self, state: Any, logger: Any) -> None:
        from composer.utils import dist

        batch = state.batch
        ids = batch["document_uid"][batch["document_uid"] != 0].tolist()
        line = {
            "step": int(state.timestamp.batch),
            "epoch": int(state.timestamp.epoch),
            "ids": ids,
            "drawn": float(torch.rand(())),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank{dist.get_global_rank()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def served(folder: Path) -> dict[int, dict[str, Any]]:
    """Of each step: its epoch, the samples of all ranks, sorted, and rank 0's dice; steps done twice: as done last."""
    steps: dict[int, dict[str, dict]] = {}
    for path in sorted(folder.rglob("rank*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            steps.setdefault(line["step"], {})[path.name] = line
    return {
        step: {
            "epoch": ranks["rank0.jsonl"]["epoch"],
            "ids": sorted(i for line in ranks.values() for i in line["ids"]),
            "drawn": ranks["rank0.jsonl"]["drawn"],
        }
        for step, ranks in sorted(steps.items())
    }


def each_once(steps: dict[int, dict[str, Any]]) -> None:
    """The first epoch served each sample, and none twice."""
    first = [i for step in steps.values() if step["epoch"] == 0 for i in step["ids"]]
    assert len(first) == len(set(first)) == SAMPLES


def run(files: list[str], arguments: list[str] = ()) -> str:
    """A whole run on all ranks, with :class:`Served` among the callbacks that can be named."""
    from opsin.training.config import load
    from opsin.training.registry import callbacks
    from opsin.training.train import train

    if "served" not in callbacks.names():
        callbacks.register("served", Served)
    return str(train(load(files, arguments)).path)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of a nested state by their path; lists and tuples alike."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{name}/{i}").items()}
    return {name: value}


def equal(a: Any, b: Any) -> bool:
    """Two leaves, to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if hasattr(a, "dtype"):  # numpy
        return bool((a == b).all())
    return a == b
