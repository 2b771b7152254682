"""What one does with a finished run: give it away, ask it, score it; and what one can get wrong there."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForImageTextToText

from opsin.models.errors import UserError
from opsin.models.export import HEADS
from opsin.training.finished import ask, evaluate_run, export_run
from opsin.training.train import train

import runs
import zoo


def exported(run: Path, out: Path) -> str:
    said = io.StringIO()
    export_run(run, out, Console(file=said, width=1000))
    return said.getvalue()


def test_a_run_is_given_away_asked_and_scored(tmp_path: Path, scenes: str) -> None:
    folder = train(runs.loaded(tmp_path, scenes, max_duration="1ba"))
    said = exported(folder.path, tmp_path / "mine")
    assert "plain transformers gives the same logits on 3 samples" in said and said.count("\n") == 1
    assert "same logits as in training" in (tmp_path / "mine" / "README.md").read_text()
    assert not list((tmp_path / "mine").glob(HEADS))
    AutoModelForImageTextToText.from_pretrained(tmp_path / "mine")
    with pytest.raises(UserError, match="not empty; choose a new folder"):
        exported(folder.path, tmp_path / "mine")
    # A run and its export give one answer.
    picture = tmp_path / "picture.png"
    picture.write_bytes(zoo.picture(1, (96, 96)))
    answers = {
        ask(str(p), "what colour is it ?", [picture], None, 4) for p in (folder.path, tmp_path / "mine")
    }
    assert len(answers) == 1
    # Scores of other data stand beside the run's own summary.
    before = folder.summary.read_text()
    evaluate_run(folder.path, scenes, 4, Console(file=io.StringIO()))
    assert folder.summary.read_text() == before
    (scored,) = (folder.path / "eval").glob("*.json")
    assert json.loads(scored.read_text())["all"]["n"] > 0
    # Mistakes are one line each.
    (tmp_path / "words.txt").write_text("no picture")
    for mistake, message in (
        (lambda: ask(str(folder.path), "?", [tmp_path / "words.txt"], None, 4), "no picture that can be read"),
        (lambda: ask(str(folder.path), "?", [tmp_path / "no.png"], None, 4), "No such file or directory"),
        (lambda: ask(str(folder.path), "?", [], "vicuna", 4), "--chat-template 'vicuna': unknown; did you mean 'vicuna_v1'"),
        (lambda: ask(str(folder.path) + "l", "?", [], None, 4), "no run and no model folder; did you mean 'small'"),
        (lambda: exported(folder.path.with_name("smal"), tmp_path / "x"), "no run folder (no config.yaml); did you mean 'small'"),
        (lambda: evaluate_run(folder.path, None, None, Console()), "names no evaluation data; give --remote"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            mistake()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_an_export_with_bidirectional_images_says_by_how_much_plain_loading_differs(
    tmp_path: Path, scenes: str
) -> None:
    model = {**runs.SMALL["model"], "bidirectional_images": True}
    folder = train(runs.loaded(tmp_path, scenes, model=model, max_duration="1ba"))
    said = exported(folder.path, tmp_path / "mine")
    assert "see themselves bidirectionally" in said and said.count("\n") == 1
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "logits differ by up to" in card and "opsin.models.export.load_model(folder)" in card
