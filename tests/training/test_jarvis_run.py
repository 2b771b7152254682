"""JARVIS in whole runs from YAML: resumption, controls, stages, stored features, what is refused and how it says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin.algorithms.jarvis import JARVIS
from opsin.models.errors import UserError
from opsin.models.export import HEADS
from opsin.training.cli import app
from opsin.training.config import load
from opsin.training.metrics_file import read_metrics
from opsin.training.run_folder import RunFolder
from opsin.training.train import train

import runs
from methods import Bench, teacher

MODEL = {**runs.SMALL["model"], "patch_size": 8, "bidirectional_images": True}
KEYS = ("loss/train/total", "loss/train/lm", "loss/train/jarvis", "jarvis/cosine", "jarvis/views_masked")


def jarvis(**arguments: Any) -> dict[str, Any]:
    spec = {
        "target": {"name": "tower", "path": "scenes"},
        "stages": ["instruct"],
        "log_interval": 1,
        "weight": 0.5,
    }
    return {"jarvis": {**spec, **arguments}}  # fmt: skip


def run(folder: Path, data: str, *arguments: str, **changes: Any) -> RunFolder:
    changes = {"model": MODEL, "max_duration": "2ba", "save_interval": "2ba", **changes}
    return train(runs.loaded(folder, data, *arguments, **changes))


def told(folder: RunFolder, keys: tuple[str, ...] = KEYS) -> list[list[float | None]]:
    return [[line.get(key) for key in keys] for line in read_metrics(folder.metrics)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> RunFolder:
    return run(tmp_path_factory.mktemp("jarvis"), scenes, algorithms=jarvis(), max_duration="4ba")


def as_if_killed(folder: RunFolder, last: int, kept: int) -> None:
    """Checkpoints and marks of a run that was killed before its last step."""
    checkpoints = folder.checkpoints("instruct")
    for path in checkpoints.glob("*"):
        if f"ba{last}" in path.name or path.is_symlink():
            path.unlink()
    (checkpoints / "latest-rank0.pt").symlink_to(next(checkpoints.glob(f"*ba{kept}*")).name)
    (folder.stage("instruct") / "done.json").unlink()


def test_cosines_are_logged_and_are_the_loss(trained: RunFolder) -> None:
    lines = read_metrics(trained.metrics)
    assert len(lines) == 4
    for line in lines:
        assert line["jarvis/cosine"] == pytest.approx(-line["loss/train/jarvis"] / 0.5, abs=1e-5)
        assert line["jarvis/views_masked"] + line["jarvis/views_without"] == 8
        assert line["jarvis/views_too_small"] == 0
    assert 0 < sum(line["jarvis/views_without"] for line in lines) < 20
    assert lines[-1]["jarvis/cosine"] > lines[0]["jarvis/cosine"]


@pytest.mark.parametrize("arguments", [{}, {"train": "proj", "masks": "parity", "text_loss": "masked"}], ids=["all", "proj"])  # fmt: skip
def test_a_killed_run_goes_on_with_the_same_masks_and_losses(
    tmp_path: Path, scenes: str, trained: RunFolder, arguments: dict
) -> None:
    options: dict[str, Any] = {"algorithms": jarvis(**arguments), "max_duration": "4ba"}
    begun = run(tmp_path, scenes, **options)
    whole = told(begun)
    if not arguments:
        assert whole == told(trained)
    as_if_killed(begun, 4, 2)
    again = run(tmp_path, scenes, **options)
    assert told(again) == whole and all(value is not None for line in whole for value in line)


def test_a_run_that_is_really_killed_goes_on_with_the_same_masks_and_losses(
    tmp_path: Path, scenes: str
) -> None:
    """SIGKILL in mid-epoch, workers and all, with masks of the branch."""
    changes = {
        "algorithms": jarvis(text_loss="unmasked"), "model": MODEL, "max_duration": "7ba", "save_interval": "2ba",
        "train_loader": {"num_workers": 1},
    }  # fmt: skip
    whole = train(runs.loaded(tmp_path, scenes, "run_name=whole", **changes))
    config = runs.config_file(tmp_path, scenes, "killed.yaml", **{**changes, "run_name": "killed"})
    folder = tmp_path / "runs" / "killed"
    runs.killed(config, folder, 5)
    assert not (folder / "model").exists()
    assert told(train(load([config]))) == told(whole)


def test_controls_run_and_an_export_stays_bidirectional(tmp_path: Path, scenes: str, trained: RunFolder) -> None:  # fmt: skip
    causal = {**MODEL, "bidirectional_images": False}
    found = {
        "causal": run(tmp_path, scenes, "run_name=causal", model=causal),
        "bidirectional": run(tmp_path, scenes, "run_name=bidirectional"),
        "unmasked": run(tmp_path, scenes, "run_name=unmasked", algorithms=jarvis(masks="none")),
        "masked": run(tmp_path, scenes, "run_name=masked", algorithms=jarvis(text_loss="masked")),
        "jarvis": trained,
    }
    first = {name: told(folder)[0][1] for name, folder in found.items()}
    # Words see the whole image, hear it both ways, or guess.
    assert first["unmasked"] == first["bidirectional"] == first["jarvis"]
    assert len({first["causal"], first["bidirectional"], first["masked"]}) == 3
    for name, folder in found.items():
        noted = json.loads((folder.model / "config.json").read_text())["opsin"]
        assert noted["image_attention"] == ("causal" if name == "causal" else "bidirectional")


def test_off_by_weight_or_by_name_is_the_run_in_which_it_was_never_named(tmp_path: Path, scenes: str) -> None:
    plain = run(tmp_path, scenes, "run_name=plain")
    for i, (arguments, spec) in enumerate([((), jarvis(weight=0)), (("algorithms.jarvis=false",), jarvis())]):
        off = run(tmp_path, scenes, f"run_name=off{i}", *arguments, algorithms=spec)
        assert told(off, KEYS[:2]) == told(plain, KEYS[:2])


def test_align_with_jarvis_and_instruct_without(tmp_path: Path, scenes: str) -> None:
    """The paper's: captions alone, masked; then questions, plain. What is given away has no head."""
    stages = {
        "align": {"chat_template": "plain", "max_duration": "2ba", "trainable": {"language_model": False}},
        "instruct": {"max_duration": "1ba"},
    }
    spec = jarvis(train="proj", lr=1e-3, stages=["align"])
    both = run(tmp_path, scenes, stages=stages, algorithms=spec)
    lines = read_metrics(both.metrics)
    assert [(line["stage"], "loss/train/jarvis" in line) for line in lines] == [
        ("align", True), ("align", True), ("instruct", False),
    ]  # fmt: skip
    again = run(tmp_path, scenes, "init_from=small@align", "run_name=again", max_duration="1ba")
    assert told(again, KEYS[:2])[0] == told(both, KEYS[:2])[2]
    out = CliRunner().invoke(app, ["export", str(both.path), str(tmp_path / "out")])
    assert out.exit_code == 0, out.output
    for folder in (both.model, again.model, tmp_path / "out"):
        assert not list(folder.glob(HEADS))
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept["opsin"]["image_attention"] == "bidirectional"


def test_text_loss_follows_the_template() -> None:
    for template, branch in (("plain", False), ("vicuna_v1", True)):
        for text_loss, wanted in (("auto", branch), ("masked", False), ("unmasked", True)):
            method = JARVIS(target=teacher(), text_loss=text_loss)
            Bench(method, size=32, bidirectional=True, template=template)
            assert method.branch == wanted
            Bench(none := JARVIS(target=teacher(), text_loss=text_loss, masks="none"), template=template)
            assert not none.branch


@pytest.mark.parametrize("how", [["--sidecar"], pytest.param([], marks=pytest.mark.slow)], ids=["sidecar", "copy"])  # fmt: skip
def test_stored_features_give_the_losses_of_computed_ones(
    tmp_path: Path, scenes: str, trained: RunFolder, how: list[str]
) -> None:
    out = tmp_path / "stored"
    made = CliRunner().invoke(
        app,
        ["data", "features", scenes, str(out), "--model", str(trained.path), "--target", "tower", "--set", "path=scenes", *how],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    dataset = {"remote": scenes, "patch_targets": str(out)} if how else {"remote": str(out)}
    loader = {"train_loader": {"num_workers": 0, "dataset": dataset}}
    stored = run(tmp_path, scenes, "run_name=stored", algorithms=jarvis(stored="required"), **loader)
    online, here = told(trained)[:2], told(stored)
    assert online[0][1] == here[0][1] and online[0][4] == here[0][4]
    for a, b in zip(online, here, strict=True):
        assert a[2] == pytest.approx(b[2], abs=2e-3)
    if not how:
        return
    assert online[0][2] != here[0][2]  # bf16: they were read
    ignored = run(tmp_path, scenes, "run_name=ignored", algorithms=jarvis(stored="ignore"), **loader)
    assert told(ignored) == online
    other = jarvis(target={"name": "tower", "path": "scenes", "layer": 1})
    with pytest.raises(UserError, match=r"algorithms.jarvis.target: .* make them anew with `opsin data features`"):  # fmt: skip
        run(tmp_path, scenes, "run_name=other", algorithms=other, **loader)


def test_stored_features_that_are_not_there_are_asked_for(tmp_path: Path, scenes: str) -> None:
    with pytest.raises(UserError, match=r"algorithms.jarvis.stored: .* make them with `opsin data features`"):
        run(tmp_path, scenes, algorithms=jarvis(stored="required"))


@pytest.mark.parametrize(
    ("key", "message"),
    [("weight=-1", "jarvis.weight"), ("weight=high", "jarvis.weight: expected float"), ("masks=defalt", "masks 'defalt': unknown; did you mean 'default'"),
     ("masks.presett=parity", "masks.presett: unknown key"), ("masks.preset=party", "masks 'party': unknown; did you mean 'parity'"),
     ("layer=99", "jarvis.layer: 99: the language model has layers 1 to 2"), ("layer=1.5", "jarvis.layer: expected"),
     ("target=tower2", "jarvis.target: unknown target 'tower2'"), ("target.pth=x", "jarvis.target.pth: unknown key; did you mean 'path'"),
     ("train=proj+erly", "train 'proj+erly': unknown; did you mean 'proj+early'"), ("trian=proj", "jarvis.trian: unknown key; did you mean 'train'"),
     ("ntp_probability=2", "ntp_probability: 2"), ("stages=[aling]", "jarvis.stages: no stage 'aling'")],
)  # fmt: skip
def test_mistakes_end_in_one_line(tmp_path: Path, scenes: str, key: str, message: str) -> None:
    spec = jarvis(masks={}) if "masks." in key else jarvis()
    with pytest.raises(UserError) as refused:
        run(tmp_path, scenes, f"algorithms.jarvis.{key}", algorithms=spec)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.glob("runs/*/stages/*/model"))


def test_what_does_not_fit_the_model_is_said_by_a_check(tmp_path: Path, scenes: str) -> None:
    coarse = {**MODEL, "patch_size": 16}
    frozen = {"vision_tower": True, "mm_projector": True, "language_model": False}
    for name, changes, message in (
        ("coarse", {"model": coarse}, "algorithms.jarvis.masks: no blocks fit on 4x4 patches"),
        ("frozen", {"model": MODEL, "trainable": frozen, "algorithms": jarvis(train="proj+early")}, "algorithms.jarvis.train: proj+early"),
    ):  # fmt: skip
        changes = {"algorithms": jarvis(), **changes}
        config = runs.config_file(tmp_path, scenes, f"{name}.yaml", run_name=name, **changes)
        result = CliRunner().invoke(app, ["train", config, "--check"])
        assert isinstance(result.exception, UserError) and message in str(result.exception), result.output
        assert "\n" not in str(result.exception)


def test_an_attention_without_masks_is_refused() -> None:
    drill = Bench(JARVIS(target=teacher(), ntp_probability=0.0), size=32)
    drill.model.anatomy.decoder(drill.model.hf).config._attn_implementation = "flash_attention_2"  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"algorithms.jarvis: masks need .* not model.attn_implementation: flash_attention_2"):  # fmt: skip
        drill._tell("init")
