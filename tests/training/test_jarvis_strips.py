"""JARVIS's strips in whole runs from a YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin.models.errors import UserError
from opsin.training.metrics_file import read_metrics
from opsin.training.train import train

import runs

JARVIS = {
    "jarvis": {"target": {"name": "tower", "path": "scenes"}, "log_interval": 2, "stages": ["instruct"]}
}
MODEL = {**runs.SMALL["model"], "patch_size": 8, "bidirectional_images": True}


def test_strips_are_written_and_leave_training_untouched(tmp_path: Path, scenes: str) -> None:
    shown = {"jarvis_pictures": {"remote": scenes, "images": 2, "interval": "3ba"}}
    options = {"algorithms": JARVIS, "model": MODEL, "max_duration": "4ba"}
    with_strips = train(runs.loaded(tmp_path, scenes, callbacks=shown, **options))
    folder = with_strips.stage("instruct") / "jarvis_pictures"
    assert sorted(p.name for p in folder.iterdir()) == ["ba3.png", "ba4.png"]
    cells = []
    for name in ("ba3.png", "ba4.png"):
        with Image.open(folder / name) as strip:
            assert strip.size == (4 * 132 + 4, 2 * 132 + 4 + 16)
            cells.append(
                [np.asarray(strip.crop((4 + 132 * c, 20, 132 + 132 * c, 280)), float) for c in range(4)]
            )
    before, after = cells
    # Same pictures, same blocks, same target; other predictions.
    assert all(np.array_equal(before[c], after[c]) for c in range(3)) and (before[3] != after[3]).any()
    # One picture and the next: every column differs.
    assert all((column[:128] != column[132:]).mean() > 0.05 for column in after)
    plain = train(runs.loaded(tmp_path, scenes, run_name="plain", **options))
    a, b = (
        [{k: v for k, v in line.items() if k.startswith(("loss/", "jarvis/"))} for line in read_metrics(p)]
        for p in (with_strips.metrics, plain.metrics)
    )
    assert a == b and len(a) == 4 and any("jarvis/views_masked" in line for line in a)
    weights = [p.stage("instruct") / "model" / "model.safetensors" for p in (with_strips, plain)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_mistake_names_the_callback(tmp_path: Path, scenes: str) -> None:
    shown = {"jarvis_pictures": {"remote": scenes, "images": 0}}
    with pytest.raises(UserError, match=r"callbacks\.jarvis_pictures\.images: 0 is less than 1"):
        train(runs.loaded(tmp_path, scenes, algorithms=JARVIS, model=MODEL, callbacks=shown))


@pytest.mark.world
def test_strips_of_a_sharded_run(ranks: Any, tmp_path: Path, scenes: str) -> None:
    """All ranks run the sharded model, one writes."""
    shown = {"jarvis_pictures": {"remote": scenes, "images": 2, "interval": "1ba"}}
    config = runs.config_file(
        tmp_path, scenes, algorithms=JARVIS, model=MODEL, callbacks=shown, max_duration="2ba",
        parallelism_config={"fsdp2": {}},
    )  # fmt: skip
    results = ranks.run("jobs:run_yaml", files=[config])
    folder = Path(results[0]["folder"]) / "stages/instruct/jarvis_pictures"
    assert sorted(p.name for p in folder.iterdir()) == ["ba1.png", "ba2.png"]
    with Image.open(folder / "ba2.png") as strip:
        assert strip.size == (4 * 132 + 4, 2 * 132 + 4 + 16)
