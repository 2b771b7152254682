"""ROSS in whole runs: strips while training, the condition curve of a finished run, the method switched from a YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composer.loggers import LoggerDestination
from PIL import Image
from typer.testing import CliRunner

from opsin.algorithms.ross.diffusion import cosine_alpha_bar
from opsin.models.errors import UserError
from opsin.training.cli import app
from opsin.training.metrics_file import read_metrics
from opsin.training.registry import loggers
from opsin.training.train import train

import runs

ROSS = {"ross": {"target": "autoencoder", "width": 64, "draws": 1}}


class Pictures(LoggerDestination):
    """Takes images, as TensorBoard's and Weights & Biases' loggers do."""

    taken: list[tuple[str, int, tuple[int, ...]]] = []  # noqa: RUF012

    def log_images(  # as Composer calls it: all by position
        self, images: Any, name: str = "Images", channels_last: bool = False, step: Any = None, *unused: Any
    ) -> None:
        assert channels_last
        Pictures.taken.append((name, step, np.asarray(images).shape))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> tuple[Path, Path]:
    """A run with strips, and the same one without."""
    if "pictures" not in loggers.names():
        loggers.register("pictures", Pictures)
    where = tmp_path_factory.mktemp("ross")
    shown = {"ross_pictures": {"remote": scenes, "images": 2, "interval": "5ba", "steps": 4}}
    evaluation = {"dataset": {"remote": scenes}, "limit": 4, "pictures": 0}
    Pictures.taken.clear()
    folder = train(
        runs.loaded(
            where, scenes, algorithms=ROSS, callbacks=shown, loggers={"pictures": {}}, evaluation=evaluation
        )
    )
    plain = train(runs.loaded(where, scenes, algorithms=ROSS, run_name="plain"))
    return folder.path, plain.path


def test_strips_are_written_and_logged_and_leave_training_untouched(trained: tuple[Path, Path]) -> None:
    shown, _ = trained
    strips = sorted((shown / "stages/instruct/pictures").glob("*.png"))
    assert [s.name for s in strips] == ["ba10.png", "ba12.png", "ba5.png"]
    with Image.open(strips[0]) as strip:
        assert strip.size == (3 * 132 + 4, 2 * 132 + 4 + 16)
        # Picture and what the target keeps of it look alike; the reconstruction of 12 steps does not.
        cells = [np.asarray(strip.crop((4 + 132 * c, 20, 132 + 132 * c, 148)), float) for c in range(3)]
    assert abs(cells[0] - cells[1]).mean() < 12 < abs(cells[0] - cells[2]).mean()
    assert [(name, step) for name, step, _ in Pictures.taken] == [
        ("ross/reconstruction", s) for s in (5, 10, 12)
    ]
    assert Pictures.taken[0][2] == (1, *np.asarray(Image.open(strips[0])).shape)
    keys = ("loss/train/total", "loss/train/lm", "loss/train/ross")
    a, b = ([[line[k] for k in keys] for line in read_metrics(p / "metrics.jsonl")] for p in trained)
    assert a == b and len(a) == 12


def test_reconstruct_measures_a_finished_run_against_another(trained: tuple[Path, Path]) -> None:
    shown, plain = trained
    options = ["--limit", "9", "--times", "3", "--pictures", "2", "--steps", "3", "--against", str(plain)]
    result = CliRunner().invoke(app, ["reconstruct", str(shown), *options])
    assert result.exit_code == 0, result.output
    assert "condition gain (another's minus right)" in result.output
    found = json.loads((shown / "ross.json").read_text())
    assert found["times"] == [166, 500, 833] and found["views"] == 9
    assert set(found["loss"]) == {"right", "another", "zero"}
    assert found["ignoring_white"] == pytest.approx(cosine_alpha_bar()[[166, 500, 833]].tolist())
    # The two runs have the same weights, the noise is a function of the sample: nothing differs.
    assert found["difference"] == 0 and found["against"]["loss"] == found["loss"]
    assert set(found["psnr_dB"]) == {"target", "right", "another's", "zero", "the mean picture"}
    assert (
        found["psnr_dB"]["target"] > 20 > found["psnr_dB"]["right"]
    )  # after 12 steps there is nothing to see
    with Image.open(shown / "ross.png") as strip:
        assert strip.size == (5 * 132 + 4, 2 * 132 + 4 + 16)


def test_other_kinds_of_heads_are_not_compared(
    trained: tuple[Path, Path], tmp_path: Path, scenes: str
) -> None:
    flow = {"ross": {**ROSS["ross"], "objective": "flow_matching"}}
    other = train(runs.loaded(tmp_path, scenes, algorithms=flow, max_duration="1ba"))
    result = CliRunner().invoke(
        app, ["reconstruct", str(trained[0]), "--against", str(other.path), "--limit", "4", "--times", "2"]
    )
    assert isinstance(result.exception, UserError)
    assert "its ross.objective is 'flow_matching', this run's is 'epsilon'" in str(result.exception)


def test_a_run_starts_with_the_head_of_another_run(
    trained: tuple[Path, Path], tmp_path: Path, scenes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """``init_from: RUN`` keeps heads by default, as it says; the run's ``model`` folder has none."""
    losses = {}
    for heads in ("keep", "new"):
        folder = train(
            runs.loaded(
                tmp_path, scenes, f"init_from.path={trained[0]}", f"init_from.heads={heads}", f"run_name={heads}",
                algorithms=ROSS, max_duration="1ba",
            )
        )  # fmt: skip
        losses[heads] = read_metrics(folder.metrics)[0]
    assert losses["keep"]["loss/train/lm"] == losses["new"]["loss/train/lm"]
    assert losses["keep"]["loss/train/ross"] < losses["new"]["loss/train/ross"] - 0.01
    assert "ross: dit of width 64, " in capsys.readouterr().err  # what the method made of its arguments


def test_strips_of_a_resumed_run_are_those_of_a_whole_one(tmp_path: Path, scenes: str) -> None:
    shown = {"ross_pictures": {"remote": scenes, "images": 1, "interval": "5ba", "steps": 2}}
    options = {"algorithms": ROSS, "callbacks": shown, "save_interval": "4ba"}
    begun = train(runs.loaded(tmp_path, scenes, **options, max_duration="12ba"))
    whole = sorted(p.name for p in (begun.stage("instruct") / "pictures").glob("*"))
    checkpoints = begun.checkpoints("instruct")
    for path in checkpoints.glob("*"):  # as if it had been killed after batch 8
        if "ba12" in path.name or path.is_symlink():
            path.unlink()
    kept = next(p for p in checkpoints.glob("*ba8*"))
    (checkpoints / "latest-rank0.pt").symlink_to(kept.name)
    (begun.stage("instruct") / "done.json").unlink()
    for path in (begun.stage("instruct") / "pictures").glob("*"):
        path.unlink()
    again = train(runs.loaded(tmp_path, scenes, **options, max_duration="12ba"))
    assert whole == ["ba10.png", "ba12.png", "ba5.png"]
    assert sorted(p.name for p in (again.stage("instruct") / "pictures").glob("*")) == [
        "ba10.png",
        "ba12.png",
    ]


def test_what_cannot_be_reconstructed_is_said_in_one_line(
    trained: tuple[Path, Path], tmp_path: Path, scenes: str
) -> None:
    without = train(runs.loaded(tmp_path, scenes, max_duration="1ba"))
    for arguments, words in (
        ([str(without.path)], "was trained without ross"),
        ([str(trained[1])], "the run names no evaluation data"),
        ([str(trained[0]), "--limit", "1"], "--limit 1: use 2 or more"),
    ):
        result = CliRunner().invoke(app, ["reconstruct", *arguments])
        assert isinstance(result.exception, UserError) and words in str(result.exception)


def test_pictures_of_a_target_without_decoder_are_refused(tmp_path: Path, scenes: str) -> None:
    features = {"name": "features", "timm": "test_vit", "weights": None, "mean": [0.5] * 3, "std": [0.5] * 3}
    callback = {"ross_pictures": {"remote": scenes, "images": 1}}
    algorithms = {"ross": {"target": features, "objective": "cosine"}}
    with pytest.raises(UserError, match="cannot be turned into pictures"):
        train(runs.loaded(tmp_path, scenes, algorithms=algorithms, callbacks=callback, max_duration="1ba"))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("algorithms.ross.targett=vae", "unknown key; did you mean 'target'?"),
        ("algorithms.ross.target=pixel", "unknown target 'pixel'; did you mean 'pixels'?"),
        ("algorithms.ross.target.cel=8", "unknown key; did you mean 'cell'?"),
        ("algorithms.ross.objective=eps", "unknown objective 'eps'"),
        ("algorithms.ross.head=mlp", "objective 'epsilon' needs dit or vit, not 'mlp'"),
        ("callbacks.ross_pictures.interval=0ba", "interval"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(
    tmp_path: Path, scenes: str, key: str, message: str
) -> None:
    ross = {"ross": {"target": {"name": "pixels"} if "target.cel" in key else "pixels"}}
    callbacks = {"ross_pictures": {"remote": scenes}}
    with pytest.raises(UserError) as refused:
        train(runs.loaded(tmp_path, scenes, key, algorithms=ross, callbacks=callbacks))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()
