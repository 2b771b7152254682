"""``opsin hidden-features`` on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from opsin.models.errors import UserError
from opsin.training.hidden_features import hidden_features
from opsin.training.train import train

import runs

MODEL = {**runs.SMALL["model"], "patch_size": 8, "bidirectional_images": True}
TARGET = {"name": "tower", "path": "scenes"}


def test_the_stage_with_jarvis_is_looked_at(tmp_path: Path, scenes: str) -> None:
    """The last stage that used it, be it followed by others; the table goes beside the run's scores."""
    stages = {
        "align": {"chat_template": "plain", "max_duration": "2ba"},
        "instruct": {"chat_template": "vicuna_v1", "max_duration": "1ba"},
    }
    folder = train(
        runs.loaded(tmp_path, scenes, model=MODEL, stages=stages, algorithms={"jarvis": {"target": TARGET}})
    )
    console = Console(record=True, width=120)
    found = hidden_features(
        folder.path, scenes, fit=20, limit=33, console=console
    )  # 33: one more than a batch
    record = json.loads((folder.path / "jarvis.json").read_text())
    assert record["stage"] == "align" and record["layer"] == 1 and record["pictures"] == 33
    assert record["rows"]["mean"]["cosine"]["mean"] == 0
    assert record["rows"]["jarvis"]["cosine"]["mean"] == found.cosine["jarvis"].mean()
    assert "another picture's features" in console.export_text()
    with pytest.raises(UserError, match=r"--limit 1: use 2 or more"):
        hidden_features(folder.path, scenes, limit=1, console=console)
    with pytest.raises(UserError, match=r"names no evaluation data; give --remote"):
        hidden_features(folder.path, None, console=console)


def test_runs_without_hidden_blocks_are_refused(tmp_path: Path, scenes: str) -> None:
    options = {"model": MODEL, "max_duration": "1ba"}
    plain = train(runs.loaded(tmp_path, scenes, **options))
    with pytest.raises(UserError, match="no stage was trained with jarvis"):
        hidden_features(plain.path, scenes, console=Console())
    aligned = {"jarvis": {"target": TARGET, "masks": "none", "stages": ["instruct"]}}
    control = train(runs.loaded(tmp_path, scenes, run_name="control", algorithms=aligned, **options))
    with pytest.raises(UserError, match="masks: none, nothing was hidden"):
        hidden_features(control.path, scenes, console=Console())
