"""The command line as a user types it: what it answers, and mistakes in one line with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from opsin import __version__
from opsin.training import cli

import runs

Opsin = Callable[..., tuple[int, str, str]]


@pytest.fixture
def opsin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Opsin:
    """Run the console script's function in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["opsin", *arguments])
        monkeypatch.setattr(cli, "_debug", False)
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def shell(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(Path(sys.executable).with_name("opsin")), *arguments], cwd=folder, capture_output=True, text=True,
        timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


def test_a_mistake_typed_in_a_shell_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = shell("train", "quickstart.yaml", "algorithms.l2tt=true", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "opsin: command line (algorithms.l2tt=true): algorithms.l2tt: unknown algorithm 'l2tt'; did you mean 'l2t'?\n"
    )
    assert not list(tmp_path.iterdir())  # no data was made first


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["quickstart.yaml", "max_duraton=1ep"], ["max_duraton", "did you mean 'max_duration'"]),
        (["quickstart.yaml", "stages.instruct.max_duraton=1ep"], ["stages.instruct.max_duraton", "'max_duration'"]),
        (["quickstart.yaml", "algorithms.l2tt=true"], ["algorithms.l2tt", "did you mean 'l2t'"]),
        (["quickstart.yaml", "algorithms.l2t.turn=all"], ["algorithms.l2t.turn: unknown key; did you mean 'turns'"]),
        (["quickstart.yaml", "seed=many"], ["seed: expected a whole number, got text 'many'"]),
        (["quickstart.yaml", "trainable.vision_tower=3"], ["trainable.vision_tower: expected true or false"]),
        (["quickstart.yaml", "model.hiden_size=3"], ["model.hiden_size: unknown key; did you mean 'hidden_size'"]),
        (["quickstart.yaml", "stages.instruct.chat_template=chatm"], ["chat_template 'chatm': unknown; did you mean 'chatml'"]),
        (["quickstart.yaml", "stages.instruct.lr_by_part.tower=1"], ["lr_by_part.tower: unknown part"]),
        (["quickstart.yaml", "callbacks.speed_monitr={}"], ["callbacks.speed_monitr: unknown callback"]),
        (["real.yaml", "load_path=no.pt"], ["load_path: no checkpoint at 'no.pt'"]),
        (["quickstart.yaml", "load_path=no.pt"], ["load_path: goes with one stage"]),
        (["quickstrt.yaml"], ["quickstrt.yaml", "quickstart"]),
        (["quickstart.yaml", "=3"], ["'=3' is no key=value"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_made(
    opsin: Opsin, tmp_path: Path, arguments: list[str], fragments: list[str]
) -> None:
    before = set(tmp_path.iterdir())
    code, out, err = opsin("train", *arguments)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("opsin: ") and "Traceback" not in err
    for fragment in fragments:
        assert fragment in err
    assert set(tmp_path.iterdir()) == before


def test_a_store_that_cannot_be_reached_is_one_line_with_the_key(
    opsin: Opsin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    config = runs.config_file(tmp_path, "unused")
    code, _, err = opsin("train", config, "train_loader.dataset.remote=s3://nowhere/x")
    (line,) = [text for text in err.splitlines() if text.startswith("opsin: ")]
    assert code == 2 and "Traceback" not in err
    assert "train_loader.dataset" in line and "s3://nowhere/x" in line


def test_other_commands_mistakes_are_one_line_too(opsin: Opsin) -> None:
    for arguments, fragment in (
        (["eval", "runs/none"], "no run folder (no config.yaml)"),
        (["export", "runs/none", "out"], "no run folder"),
        (["algorithms", "l2tt"], "did you mean 'l2t'"),
        (["registry", "algoritms"], "did you mean 'algorithms'"),
        (["data", "inspect", "nothing"], "no MDS dataset at 'nothing'"),
        (["data", "scenes", "--out", "x", "--set", "colour=3"], "--set colour: unknown key"),
        (["data", "scenes", "--out", "x", "--split", "unifrm"], "uniform"),
    ):
        code, _, err = opsin(*arguments)
        assert code == 2 and err.count("\n") == 1 and err.startswith("opsin: ") and fragment in err, err
    code, _, err = opsin("trian")
    assert code == 2 and "No such command 'trian'" in err and "Traceback" not in err
    code, _, err = opsin("train")
    assert code == 2 and "Missing argument" in err


@pytest.mark.parametrize("order", [["--debug", "train"], ["train", "--debug"]])
def test_debug_shows_where_it_came_from(opsin: Opsin, order: list[str]) -> None:
    with pytest.raises(cli.UserError, match="max_duraton") as error:
        opsin(*order, "quickstart.yaml", "max_duraton=1ep")
    assert len(error.traceback) > 3  # what Python prints when it leaves the console script


def test_print_config_prints_what_would_be_trained_and_loads_as_itself(opsin: Opsin, tmp_path: Path) -> None:
    code, out, err = opsin("train", "quickstart.yaml", "seed=4", "algorithms.l2t=false", "--print-config")
    assert code == 0 and err == ""
    printed = yaml.safe_load(out)
    assert printed["seed"] == 4 == printed["model"]["seed"]
    assert printed["algorithms"]["l2t"]["enabled"] is False
    (tmp_path / "again.yaml").write_text(out)
    assert opsin("train", "again.yaml", "--print-config") == (0, out, "")


def test_check_shows_every_stage_and_writes_nothing(opsin: Opsin, tmp_path: Path) -> None:
    code, out, err = opsin("train", "quickstart.yaml", "--check")
    assert code == 0, err
    assert yaml.safe_load(out)["run_name"] == "quickstart"
    for word in ("stage align", "stage instruct", "vision_tower", "mm_projector", "methods: ", "l2t", "the run will make it"):  # fmt: skip
        assert word in err
    assert not list(tmp_path.iterdir())


def test_check_counts_the_steps_of_data_that_is_there(opsin: Opsin, tmp_path: Path, scenes: str) -> None:
    code, _, err = opsin("train", runs.config_file(tmp_path, scenes), "--check")
    assert code == 0 and "64 samples" in err and "8 steps an epoch" in err
    code, _, err = opsin("train", runs.config_file(tmp_path, scenes), "--check", "algorithms.l2tt={}")
    assert code == 2 and "did you mean 'l2t'" in err
    assert not (tmp_path / "runs").exists()


def test_lists_and_versions(opsin: Opsin) -> None:
    code, out, _ = opsin("algorithms")
    assert code == 0 and "l2t" in out and "gradient_clipping" in out
    code, out, _ = opsin("algorithms", "l2t")
    assert code == 0 and "lambda_instruction" in out and "default" in out
    code, out, _ = opsin("registry", "optimizers")
    assert code == 0 and "decoupled_adamw" in out
    code, out, _ = opsin("version")
    assert code == 0 and out.splitlines()[0] == f"opsin {__version__}"
    assert any(line.startswith("torch 2.") for line in out.splitlines())


def test_data_is_made_and_looked_into(opsin: Opsin) -> None:
    code, out, _ = opsin(
        "data", "scenes", "--out", "mine", "--samples", "6", "--set", "charts=0", "--set", "sign=0"
    )
    assert code == 0 and "6 samples in mine" in out
    code, out, _ = opsin("data", "inspect", "mine", "--samples", "1")
    assert code == 0 and "6 samples in 1 shards" in out and "human:" in out
    code, out, _ = opsin("data", "templates", "mine")
    assert code == 0 and "user turns" in out
    code, _, err = opsin("data", "scenes", "--out", "mine", "--samples", "6")
    assert code == 2 and "not an empty folder" in err
