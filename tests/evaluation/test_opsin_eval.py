"""``opsin eval MODEL CONFIG`` as a user types it: predictions, scores, analyses, a report; and scoring again without a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from opsin.evaluation.records import read_predictions
from opsin.training import cli
from opsin.training.run_folder import RunFolder

SCENES = {"objects": [1, 2], "charts": 0, "sign": 0, "seed": 18}
SUITES: dict[str, Any] = {
    "batch_size": 16,
    "suites": {
        "scenes": {"samples": 8, "kinds": ["colour", "size"], **SCENES},
        "ranked": {"suite": "scenes", "mode": "rank", "samples": 4, "kinds": ["colour", "size"], **SCENES},
        "pairs": {"suite": "scenes", "split": "minimal_pairs", "samples": 4, **SCENES},
    },
    "analyses": {
        "visual_contribution": {"limit": 8},
        "occlusion": {"limit": 8},
        "attention": {
            "limit": 4,
            "shown": 1,
            "data": {"suite": "scenes", "samples": 4, "kinds": ["colour"], **SCENES},
        },
        "probes": {"scenes": 24},
    },
}


def opsin(*arguments: str) -> int:
    """The command line in this process; its exit code."""
    import sys

    before = sys.argv
    sys.argv = ["opsin", *arguments]
    try:
        cli.main()
    except SystemExit as done:
        return int(done.code or 0)
    finally:
        sys.argv = before
    return 0


def written(folder: Path, body: Any, name: str = "suites.yaml") -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def measured(trained: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("measured")
    assert opsin("eval", str(trained.path), written(folder, SUITES), "--out", str(folder / "out")) == 0
    yield folder / "out"


def test_everything_is_written_and_agrees(measured: Path) -> None:
    scores = json.loads((measured / "scores.json").read_text())
    records = read_predictions(measured / "predictions.jsonl")
    assert set(scores["suites"]) == {"scenes", "ranked", "pairs"}
    for name, entry in scores["suites"].items():
        own = [r for r in records if r["suite"] == name]
        accuracy = entry["measures"]["accuracy"]
        assert accuracy["n"] == len(own) > 0
        assert accuracy["value"] == pytest.approx(sum(r["right"] for r in own) / len(own))
        assert entry["measures"]["unparsed"]["n"] == len(own) and entry["errors"] == 0
        assert entry["blind"]["measures"]["accuracy"]["n"] == len(own)
        assert len(entry["prompt_sha256"]) == 16 and entry["scorer"] == "scenes/1"
    assert scores["suites"]["pairs"]["measures"]["pair_accuracy"]["n"] == 2
    ranked = [r for r in records if r["suite"] == "ranked"]
    assert all(set(r["logprobs"]) == set(r["choices"]) and r["output"] in r["choices"] for r in ranked)
    assert all(r["gold"] in r["choices"] for r in ranked)
    for name in SUITES["analyses"]:
        assert json.loads((measured / "analyses" / f"{name}.json").read_text()) == scores["analyses"][name]
        assert (measured / "analyses" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (measured / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
    assert page.count("data:image/") > 4 and "minimal" not in page[:200]


def test_scoring_again_needs_no_model_and_says_the_same(measured: Path, tmp_path: Path) -> None:
    copy = tmp_path / "given"
    copy.mkdir()
    shutil.copy(measured / "predictions.jsonl", copy / "predictions.jsonl")  # as somebody else would get it
    assert opsin("eval", "--rescore", str(copy / "predictions.jsonl")) == 0
    before, again = (
        json.loads(path.read_text())["suites"] for path in (measured / "scores.json", copy / "rescored.json")
    )
    for name in before:
        assert again[name]["measures"] == before[name]["measures"]
        assert again[name]["by_kind"] == before[name]["by_kind"]
    command = ("eval", "--rescore", str(copy / "predictions.jsonl"), "--scorer", "scenes=first_words")
    assert opsin(*command, "--out", str(tmp_path / "words")) == 0
    words = json.loads((tmp_path / "words" / "rescored.json").read_text())["suites"]["scenes"]
    assert words["scorer"] == "first_words/1"
    assert words["measures"]["accuracy"]["value"] >= before["scenes"]["measures"]["accuracy"]["value"]


def test_a_run_again_gives_the_same_bytes(trained: RunFolder, measured: Path, tmp_path: Path) -> None:
    body = {**SUITES, "analyses": {}, "suites": {"scenes": SUITES["suites"]["scenes"]}, "batch_size": 3}
    assert opsin("eval", str(trained.model), written(tmp_path, body), "--out", str(tmp_path / "out")) == 0
    own = [r for r in read_predictions(measured / "predictions.jsonl") if r["suite"] == "scenes"]
    assert (
        read_predictions(tmp_path / "out" / "predictions.jsonl") == own
    )  # other batches, the model's folder


def test_what_cannot_be_asked_is_counted_and_the_rest_goes_on(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    from PIL import Image

    for name in ("a", "b", "c"):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (200, 30 * ord(name) % 256, 10)).save(buffer, "PNG")
        data = buffer.getvalue()
        (tmp_path / f"{name}.png").write_bytes(data[: len(data) // 2] if name == "b" else data)
    rows = [
        {"question_id": i, "image": f"{n}.png", "text": "Is it red?", "label": "yes"}
        for i, n in enumerate("abc")
    ]
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, rows)))
    body = {"suites": {"pope": {"path": str(tmp_path / "coco_pope_random.json"), "images": str(tmp_path)}}}
    assert opsin("eval", str(trained.path), written(tmp_path, body), "--out", str(tmp_path / "out")) == 0
    records = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert ["error" in r for r in records] == [False, True, False] and not records[1]["right"]
    assert "unreadable_image" in records[1]["error"]
    assert "1 of 3 questions could not be asked" in capsys.readouterr().out


def test_what_was_scored_is_kept_when_an_analysis_fails(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("scores.json", "report.html"):  # of an earlier run
        (out / name).write_text("{}")
    words = {"suite": "scenes", "stream": "text", "samples": 2, **SCENES}
    body = {
        "suites": {"scenes": {"samples": 2, "kinds": ["colour"], **SCENES}},
        "analyses": {"visual_contribution": {"data": words}},
    }
    assert opsin("eval", str(trained.path), written(tmp_path, body), "--out", str(out)) == 2
    assert "has a picture" in capsys.readouterr().err
    entry = json.loads((out / "scores.json").read_text())["suites"]["scenes"]
    assert entry["measures"]["accuracy"]["n"] == len(read_predictions(out / "predictions.jsonl"))
    assert not (out / "report.html").exists()


MISTAKES = [
    ({"suites": {"pop": {"path": "x"}}}, "suites.pop: unknown suite 'pop'; did you mean 'pope'?"),
    ({"suites": {"pope": {"pth": "x"}}}, "suites.pope.pth: unknown key; did you mean 'path'?"),
    ({"suites": {"pope": {"path": "nowhere"}}}, "suites.pope: nowhere"),
    ({"suites": {"scenes": {"samples": 0}}}, "samples: 0: use 1 or more"),
    ({"suites": {"scenes": {}}, "batchsize": 3}, "batchsize: unknown key; did you mean 'batch_size'?"),
    ({"suites": {"scenes": {}}, "limit": 0}, "limit: 0: use 1 or more"),
    ({"suites": {"a/b": {"suite": "scenes"}}}, "suites.a/b: 'a/b': use letters"),
    (
        {"analyses": {"atention": {}}},
        "analyses.atention: unknown analysis 'atention'; did you mean 'attention'?",
    ),
    ({"analyses": {"attention": {"queries": "last"}}}, "queries: 'last'"),
    ({"analyses": {"occlusion": {"data": 3}}}, "analyses.occlusion.data: give the questions"),
    ({}, "nothing is asked"),
    ({"suites": {"scenes": {}}, "baseline": "nowhere.json"}, "baseline: nowhere.json"),
    ({"suites": {"scenes": {}}, "precision": "fp8"}, "precision: 'fp8'"),
    ({"suites": {"scenes": {}}, "device": "tpu"}, "device: 'tpu': use cpu or gpu"),
    ({"suites": {"scenes": {"samples": 2, "scorer": "pope"}}}, "suites.scenes: suite scenes"),
    (
        {"suites": {"scenes": {}}, "fusion": {"strenght": 1}},
        "fusion.strenght: unknown key; did you mean 'strength'?",
    ),
    ({"suites": {"scenes": {}}, "lmms": {"task": ["pope"]}}, "lmms.task: unknown key; did you mean 'tasks'?"),
]


@pytest.mark.parametrize(("body", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(
    body: dict[str, Any], said: str, trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opsin("eval", str(trained.path), written(tmp_path, body), "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("opsin: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


GIVEN = '"suite": "a", "id": "1", "kind": "k", "gold": "yes", "output": "no"'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no predictions in it"),
        ("{", "p.jsonl:1: no JSON"),
        ("[1]", "p.jsonl:1: no prediction, but a list"),
        ('{"suite": "a", "id": "1"}', "p.jsonl:1: no prediction: kind, gold, output missing"),
        ('{"suite": "a", "id": "1", "kind": "k", "gold": "yes", "output": "no"}', "suite a names no scorer; give --scorer a=NAME"),
        ('{"suite": "a", "id": "1", "kind": "k", "gold": "yes", "output": "no", "scorer": "popo"}', "scorer 'popo'; did you mean 'pope'?"),
        (f'{{{GIVEN}, "meta": 3}}', "p.jsonl:1: meta is no object but 3"),
        (f'{{{GIVEN}, "logprobs": [1]}}', "p.jsonl:1: logprobs is no object but [1]"),
        (f'{{{GIVEN}, "choices": [1]}}', "p.jsonl:1: choices are not all text"),
        (f'{{{GIVEN}, "scorer": "pope"}}\n{{{GIVEN.replace("1", "2")}, "scorer": "exact"}}', "suite a names scorers pope and exact"),
    ],
)  # fmt: skip
def test_a_mistake_in_predictions_is_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    assert opsin("eval", "--rescore", str(tmp_path / "p.jsonl")) == 2
    assert said in capsys.readouterr().err


def test_predictions_made_by_hand_are_scored(tmp_path: Path) -> None:
    """File exchange: any program can write these five keys."""
    lines = [
        {"suite": "pope", "id": str(i), "kind": "random", "gold": gold, "output": said, "scorer": "pope"}
        for i, (gold, said) in enumerate(
            [("yes", "Yes."), ("no", "No, there is not."), ("no", "yes"), ("yes", "no")]
        )
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert opsin("eval", "--rescore", str(tmp_path / "p.jsonl")) == 0
    measures = json.loads((tmp_path / "rescored.json").read_text())["suites"]["pope"]["measures"]
    assert {k: measures[k]["value"] for k in ("accuracy", "precision", "recall", "yes_ratio", "unparsed")} == {
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "yes_ratio": 0.5, "unparsed": 0.0,
    }  # fmt: skip
