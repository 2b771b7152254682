"""Strips of a method that exists for tests, beside ROSS's in one run: whose folder, what is seen, what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from opsin.algorithms.picture_strips import PictureStrips
from opsin.data.schema import COLUMNS, pack_images
from opsin.models.errors import UserError
from opsin.training.metrics_file import read_metrics
from opsin.training.registry import algorithms, callbacks
from opsin.training.train import train

import runs
from methods import MeanColour

METHODS = {"mean_colour": {}, "ross": {"target": "pixels", "objective": "mse", "head": "mlp"}}


class ColourPictures(PictureStrips[MeanColour]):
    """Each patch in the colour that the head reads off the language model."""

    method = MeanColour
    key = "colour_pictures"
    image_name = "mean_colour/read"
    folder_name = "colour_pictures"
    seen: list[tuple[str, Any]] = []  # noqa: RUF012

    def enter(self, algorithm: MeanColour, model: Any, device_batch: dict[str, Any]) -> None:
        assert "label_rows" not in device_batch and device_batch["input_ids"].device.type == "cpu"
        rows = len(device_batch["input_ids"])
        device_batch["row/number"] = torch.arange(rows)
        self.seen.append(("enter", rows))

    def prepare(self, algorithm: MeanColour, model: Any, batch: dict[str, Any]) -> None:
        self.seen.append(("prepare", batch["row/number"].tolist()))

    def draw(self, model: Any, algorithm: MeanColour, batch: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
        assert not model.training and not torch.is_grad_enabled()
        step = model.step(batch)
        assert not step.tapped, "the record of an earlier strip"
        step.taps.add(algorithm.layer)
        model(batch)
        hidden = step.tapped[algorithm.layer].flatten(0, 1)[batch["patch_position"]]
        read = model.net.auxiliary[algorithm.name](hidden).split([r * c for r, c in batch["grids"]])
        shown = [c.T.unflatten(1, grid).float() for c, grid in zip(read, batch["grids"], strict=True)]
        self.seen.append(("draw", batch["row/number"].tolist()))
        return {"picture": model.pictures(batch), "read": shown}


@pytest.fixture(autouse=True)
def _registered() -> None:
    ColourPictures.seen.clear()
    if "mean_colour" not in algorithms.names():
        algorithms.register("mean_colour", MeanColour)
    if "colour_pictures" not in callbacks.names():
        callbacks.register("colour_pictures", ColourPictures)


def test_two_methods_strips_of_one_run_have_folders_of_their_own(tmp_path: Path, scenes: str) -> None:
    shown = {"remote": scenes, "images": 2, "interval": "2ba"}
    both = {"ross_pictures": shown, "colour_pictures": {**shown, "side": 64}}
    options = {"algorithms": METHODS, "max_duration": "3ba"}
    stage = train(runs.loaded(tmp_path, scenes, callbacks=both, **options)).stage("instruct")
    for folder in ("pictures", "colour_pictures"):
        assert sorted(p.name for p in (stage / folder).iterdir()) == ["ba2.png", "ba3.png"]
    with Image.open(stage / "pictures/ba3.png") as ross, Image.open(stage / "colour_pictures/ba3.png") as own:
        assert ross.size == (3 * 132 + 4, 2 * 132 + 4 + 16) and own.size == (2 * 68 + 4, 2 * 68 + 4 + 16)
        # The same pictures in both.
        small = ross.crop((4, 20, 132, 148)).resize((64, 64))
        assert abs(np.asarray(small, float) - np.asarray(own.crop((4, 20, 68, 84)), float)).mean() < 6
    # What is put into the device batch goes through the split to every strip.
    assert ColourPictures.seen == [("enter", 2), ("prepare", [0, 1]), ("draw", [0, 1]), ("draw", [0, 1])]
    plain = train(runs.loaded(tmp_path, scenes, run_name="plain", **options))
    keys = ("loss/train/total", "loss/train/lm", "loss/train/mean_colour", "loss/train/ross")
    a, b = ([[line[k] for k in keys] for line in read_metrics(p / "metrics.jsonl")]
            for p in (stage.parent.parent, plain.path))  # fmt: skip
    assert a == b and len(a) == 3


def test_a_folder_of_ones_own_is_kept_and_a_method_that_is_off_draws_nothing(
    tmp_path: Path, scenes: str
) -> None:
    shown = {"colour_pictures": {"remote": scenes, "images": 1, "folder": str(tmp_path / "mine")}}
    options = {"callbacks": shown, "max_duration": "1ba"}
    off = {"mean_colour": {"weight": 0.0}}
    train(runs.loaded(tmp_path, scenes, run_name="off", algorithms=off, **options))
    assert not ColourPictures.seen and not (tmp_path / "mine").exists()
    on = train(runs.loaded(tmp_path, scenes, run_name="on", algorithms={"mean_colour": {}}, **options))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["ba1.png"]
    assert not (on.stage("instruct") / "colour_pictures").exists()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"images": 0}, "callbacks.colour_pictures.images: 0 is less than 1"),
        ({"interval": "0.1dur"}, "callbacks.colour_pictures.interval: '0.1dur': use 1ba or more"),
        (
            {"remote": "words"},
            "callbacks.colour_pictures.remote: the first samples of .*words have no picture",
        ),
    ],
)
def test_mistakes_name_the_callback(
    tmp_path: Path, scenes: str, keywords: dict[str, Any], message: str
) -> None:
    turns = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]
    words = {"id": "a", "conversations": turns, "images": pack_images([]), "meta": {}}
    with MDSWriter(out=str(tmp_path / "words"), columns=COLUMNS) as writer:
        writer.write(words)
    if "remote" in keywords:
        keywords = {"remote": str(tmp_path / keywords["remote"])}
    shown = {"colour_pictures": {"remote": scenes, **keywords}}
    with pytest.raises(UserError, match=message):
        train(runs.loaded(tmp_path, scenes, algorithms={"mean_colour": {}}, callbacks=shown))
    assert not ColourPictures.seen
