"""What can be wrong in a YAML, an argument or a folder: one line with the place, before anything is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from opsin.models.errors import UserError
from opsin.training import cli
from opsin.training.check import refuse_mistakes
from opsin.training.config import load
from opsin.training.prepare import MARKER, prepare
from opsin.training.provenance import Provenance
from opsin.training.run_folder import RunFolder, refuse_unwritable
from opsin.training.stages import resolve

import runs


def refusal(act: Callable[[], Any]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(UserError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"seed: 1\nseed: 2\n", "bad.yaml:2: found duplicate key seed"),
        (b"run_name: caf\xe9\n", "bad.yaml: not UTF-8 text (byte 13)"),
        (b'run_name: "${"\n', "bad.yaml: "),
        (b"? [a, b]\n: 1\n", "bad.yaml:1: found unhashable key"),
        (b"a: &x {b: *x}\n", "bad.yaml: nested without end"),
        (b"seed: !!python/object:os.system {}\n", "bad.yaml:1: could not determine a constructor"),
        (b"seed: [\n", "bad.yaml:2: not valid YAML"),
        (b"- 1\n", "bad.yaml: a configuration is a mapping"),
        (b"seed: " + b"9" * 5000, "bad.yaml: "),
        (b"run_name: ???\n", "bad.yaml:1: run_name: needs a value; give run_name=VALUE"),
        (b"stages: {a: {max_duration: '???'}}\n", "stages.a.max_duration: needs a value"),
        (b"run_name: ${none.such}\n", "bad.yaml:1: run_name: Interpolation key 'none.such' not found"),
    ],
)
def test_files_that_are_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(text)
    assert said in refusal(lambda: load(["bad.yaml"]))


def test_a_folder_is_no_file_and_a_path_with_an_equals_sign_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(lambda: load([str(tmp_path)])) == f"{tmp_path}: a folder; give a YAML file"
    (tmp_path / "lr=1.yaml").write_text("seed: 4\n")
    assert cli._is_file("lr=1.yaml") and cli._is_file("missing.yaml") and not cli._is_file("seed=1")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("global_train_batch_size=0", "expected a number, 1 or more, got 0"),
        ("global_train_batch_size=-4", "1 or more"),
        ("device_train_microbatch_size=0", "1 or more"),
        ("device_train_microbatch_size=-1", "1 or more"),
        ("max_duration=abc", "'abc': no time; a whole number and a unit"),
        ("max_duration=10", "'10': which unit (ba, ep, sp, tok, sec, dur)? for example 10ba"),
        ("max_duration=1.5ep", "no time"),
        ("max_duration=0ba", "must be more than 0"),
        ("max_duration=-3ba", "'-3ba'"),
        ("max_duration=1dur", "needs a length of its own"),
        ("save_interval=xyz", "no time"),
        ("eval_interval=xyz", "no time"),
        ("scheduler={name: cosine_with_warmup, t_warmup: long}", "scheduler.t_warmup: 'long': no time"),
        ("seed=-1", "0 to 4294967295, got -1"),
        ("precision=fp17", "'fp17': unknown; did you mean 'fp"),
        ("precision=bf16", "did you mean 'amp_bf16'?"),
        ("device=cuda", "did you mean 'gpu'?"),
        ("device=tpu", "'tpu': unknown"),
        ("device=foo", "'foo': unknown; known: cpu, gpu, mps"),
        ("train_loader.num_workers=-1", "0 or more, got -1"),
        ("train_loader.prefetch_factor=0", "1 or more"),
        ("train_loader.pad_to_multiple_of=0", "1 or more"),
        ("train_loader.turns=chain", "did you mean 'chained'?"),
        ("train_loader.dataset.shuffle_block_size=-1", "1 or more"),
        ("eval_loaders=[{batch_size: 0}]", "eval_loaders.0.batch_size: expected a number, 1 or more"),
        ("max_seq_len=0", "1 or more"),
        ("python_log_level=foo", "did you mean 'info'?"),
        ("optimizer.weight_decay=abc", "expected a number, 0 or more, got 'abc'"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected tuple["),
        ("optimizer.betas=[2, 2]", "Invalid beta parameter"),
        ("optimizer.lr=-1", "0 or more, got -1"),
        ("optimizer.lr=.nan", "0 or more, got nan"),
        ("lr_by_part.mm_projector=-1", "0 or more"),
        ("evaluation.batch_size=0", "1 or more"),
        ("preflight.batches=-1", "0 or more"),
        ("preflight.max_skipped=2", "0 to 1, got 2.0"),
        ("model.patch_size=0", "1 or more"),
        ("model.name=null", "model.name: needs a name: one of"),
        ("model.name=scenes", "did you mean 'scenes_llava'?"),
        ("algorithms.l2t.enabled=maybe", "expected true or false, got 'maybe'"),
        ("algorithms.l2t.stages=3", "expected a stage or a list of them, got 3"),
        ("algorithms.l2t.stages=[align]", "no stage 'align'"),
        ("algorithms.l2t.log_interval=0", "expected 1 or more, got 0"),
        ("algorithms.l2t.relevance_clip=[0]", "relevance_clip: expected tuple[float, float], got [0]"),
        ("algorithms.l2t.relevance_clip=[1, 0]", "[smallest, largest]"),
        ("algorithms.l2t.templates=[1]", "templates: expected"),
        ("algorithms.l2t.templates={a: 1}", "templates: expected"),
        ("algorithms.l2t.templates=latin.txt", "cannot read 'latin.txt': not UTF-8 text"),
        ("algorithms.l2t.allow=[1]", "allow: expected Sequence[str], got [1]"),
        ("algorithms.l2t.top_k=-1", "expected 0 or more, got -1"),
        ("algorithms.l2t.turns=some", "'some' is unknown"),
        ("algorithms.label_smoothing.smoothing=a", "smoothing: expected float, got 'a'"),
        ("run_name=a/b", "run_name 'a/b': use a plain name"),
        ("run_name={a}", "expected text, got a mapping"),
        ("stages={../../evil: {}}", "stages.../../evil '../../evil': use a plain name"),
        ("stage=../evil", "stage '../evil': use a plain name"),
    ],
)  # fmt: skip
def test_values_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    config = runs.config_file(tmp_path, "data", algorithms={"l2t": {}})
    line = refusal(lambda: refuse_mistakes(load([config], [argument])))
    assert said in line
    key = argument.partition("=")[0]
    assert f"command line ({argument})" in line or line.startswith("run_name"), "place of what was typed"
    assert key in line and {p.name for p in tmp_path.iterdir()} == {"latin.txt", "run.yaml"}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("device=gpu", "'gpu': none is available here; use cpu"),
        ("precision=amp_fp16", "'amp_fp16': needs a GPU; use fp32 or amp_bf16"),
    ],
)
def test_a_device_that_is_not_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = runs.loaded(tmp_path, "data", argument)
    assert said in refusal(lambda: refuse_mistakes(loaded))
    refuse_mistakes(loaded, here=False)  # --check, on another machine


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for key in ("run_root", "save_folder"):
        loaded = runs.loaded(tmp_path, "data", f"{key}={tmp_path}/file/x")
        assert "is a file, a folder is needed" in refusal(lambda loaded=loaded: refuse_mistakes(loaded))
    line = refusal(lambda: refuse_unwritable(Path("/proc/x/y"), "--out /proc/x/y"))
    assert line.startswith("--out /proc/x/y: cannot write in '/proc'")
    refuse_unwritable(tmp_path / "new" / "one", "here")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("out", ["/proc/x", "file"])
def test_an_error_of_the_system_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr("sys.argv", ["opsin", "data", "scenes", "--out", out, "--samples", "1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert left.value.code == 2 and "\n" not in said and said.startswith("opsin: ") and out in said


def test_a_key_of_the_command_line_is_meant_where_the_stage_has_a_section(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {name: scenes_llava}\nstages:\n  align: {train_loader: {packing: true}}\n")
    line = refusal(lambda: refuse_mistakes(load([str(path)], ["train_loader.num_workers=-1"])))
    assert line.startswith("command line (train_loader.num_workers=-1): train_loader.num_workers: ")
    path.write_text(path.read_text().replace("packing: true", "num_workers: -1"))
    line = refusal(lambda: refuse_mistakes(load([str(path)])))
    assert line.startswith(f"{path}:3: stages.align.train_loader.num_workers: ")
    provenance = Provenance()
    provenance.add_file("a.yaml", path.read_text().replace("num_workers: -1", "packing: true"))
    provenance.add_argument(
        ("train_loader",), "train_loader={num_workers: -1}", {"train_loader": {"num_workers": -1}}
    )
    stage = ("stages", "align")
    assert provenance.where_in_stage(stage, ("train_loader", "num_workers")) == (
        "command line (train_loader={num_workers: -1}): train_loader.num_workers"
    )
    assert (
        provenance.where_in_stage(stage, ("train_loader", "packing"))
        == "a.yaml:3: stages.align.train_loader.packing"
    )
    assert provenance.where_in_stage(stage, ("max_duration",)) == "configuration: max_duration"


def test_a_start_that_failed_does_not_hold_the_name(tmp_path: Path) -> None:
    first, second = (runs.loaded(tmp_path, "data", f"seed={seed}") for seed in (1, 2))
    folder = RunFolder(first.run.run_root, first.run.run_name)
    folder.open(first, resolve(first))
    folder.open(second, resolve(second))
    assert "seed: 2" in folder.config.read_text()
    checkpoints = folder.checkpoints("instruct")
    checkpoints.mkdir(parents=True)
    (checkpoints / "ep0-ba4-rank0.pt").touch()
    folder.open(second, resolve(second))
    assert "other settings or data (stage instruct)" in refusal(lambda: folder.open(first, resolve(first)))
    assert "seed: 2" in folder.config.read_text()


def test_a_run_folder_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    loaded = runs.loaded(tmp_path, "data")
    folder = RunFolder(loaded.run.run_root, loaded.run.run_name)
    folder.path.mkdir(parents=True)
    (folder.path / "stages.json").write_text("{")
    assert "cannot be read" in refusal(lambda: folder.open(loaded, resolve(loaded)))
    (tmp_path / "file").write_text("")
    elsewhere = RunFolder(tmp_path / "file", "x")
    assert "cannot be written: Not a directory" in refusal(lambda: elsewhere.open(loaded, resolve(loaded)))
    assert "use a plain name" in refusal(lambda: folder.stage("../../evil"))


SPEC = {"out": "made", "split": "uniform", "samples": 2, "objects": [1, 2], "charts": 0, "sign": 0}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"out": "other", "samples": 0}, "prepare.scenes.1.samples: expected 1 or more, got 0"),
        ({"out": "other", "colour": 3}, "prepare.scenes.1.colour: unknown key"),
        ({"out": "other", "kinds": ["color"]}, "did you mean 'colour'?"),
        ({"out": "other", "split": "unifrm"}, "did you mean 'uniform'?"),
        ({"out": "s3://bucket/x"}, "prepare.scenes.1.out: a local folder is needed"),
        ({"out": "./made"}, "prepare.scenes.1.out: './made' is already that of prepare.scenes.0"),
        ({"out": "full"}, "'full' holds no dataset"),
        ({"out": "full/file/x"}, "is a file, a folder is needed"),
    ],
)
def test_all_of_prepare_is_looked_at_before_any_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: dict, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    loaded = runs.loaded(tmp_path, "made", prepare={"scenes": [SPEC, {**SPEC, **second}]})
    for act in (lambda: refuse_mistakes(loaded), lambda: prepare(loaded, Console(quiet=True))):
        assert said in refusal(act)
    assert {p.name for p in tmp_path.iterdir()} == {"full", "run.yaml"}


def test_data_is_not_taken_for_what_a_changed_spec_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def make(**changes: Any) -> None:
        prepare(runs.loaded(tmp_path, "made", prepare={"scenes": [{**SPEC, **changes}]}), Console(quiet=True))

    make()
    written = Path("made/index.json").stat().st_mtime_ns
    assert json.loads(Path("made", MARKER).read_text())["samples"] == 2
    make(skew=0.75)  # the default, written out
    line = refusal(lambda: make(samples=3, objects=[1, 3]))
    assert "'made' was made with other settings (" in line and "samples=2 there, 3 here" in line
    assert "objects=[1, 2] there, [1, 3] here" in line
    Path("made", MARKER).unlink()
    make(samples=3)  # made by hand: used as it is
    assert Path("made/index.json").stat().st_mtime_ns == written
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert "No space left" in refusal(lambda: make(out="second"))
    assert {p.name for p in tmp_path.iterdir()} == {"made", "run.yaml"}
