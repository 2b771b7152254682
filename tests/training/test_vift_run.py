"""ViFT from a YAML: streams by schedule, by size and by rule; resumption; off means off; what is logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from opsin.algorithms.vift import ViFT
from opsin.data.batch import vlm_data_spec
from opsin.data.scenes import SceneConfig, sample
from opsin.data.schema import unpack_images
from opsin.data.streaming import StreamingVLMDataset
from opsin.evaluation.fused import score_fused
from opsin.evaluation.packed import score
from opsin.models.errors import UserError
from opsin.models.vlm import VisionLanguageModel
from opsin.training import cli
from opsin.training.check import check
from opsin.training.config import load
from opsin.training.finished import open_model
from opsin.training.metrics_file import read_metrics
from opsin.training.run_folder import RunFolder
from opsin.training.train import train

import jobs
import runs
import zoo
from ranks import RankPool

SIZES = {"captions": 48, "text": 24}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Captions, text-only instructions, and questions about pictures."""
    root = tmp_path_factory.mktemp("vift")
    made = {"captions": ("caption", 48), "text": ("text", 24), "questions": ("vqa", 24)}
    return {name: runs.write_scenes(root / name, n, stream=stream) for name, (stream, n) in made.items()}


def streams(data: dict[str, str], *names: str, **more: Any) -> dict[str, Any]:
    kinds = {"captions": "caption", "text": "text", "questions": "instruction"}
    return {n: {"remote": data[n], "kind": kinds[n], **more.get(n, {})} for n in names}


def changes(name: str, data: dict[str, str], vift: Any, workers: int = 0, **dataset: Any) -> dict[str, Any]:
    """Changes of a small run: two streams, 9 batches an epoch, 2 epochs."""
    dataset.setdefault("streams", streams(data, "captions", "text"))
    return {
        "run_name": name, "max_duration": "18ba", "save_interval": "2ba",
        "algorithms": {} if vift is None else {"vift": vift},
        "train_loader": {"num_workers": workers, "dataset": {"remote": None, **dataset}},
    }  # fmt: skip


def values(folder: Path, key: str) -> list[float]:
    return [line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line]


def last(folder: Path, prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in read_metrics(folder / "metrics.jsonl"):
        found.update({k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)})
    return found


def test_streams_are_mixed_by_size_in_batches_of_one_kind(tmp_path: Path, scenes: str, data: dict) -> None:
    """Nothing but the name of the method: natural proportions, single batches, vision at rest in text steps."""
    run = train(runs.loaded(tmp_path, scenes, **changes("natural", data, {"log_interval": 1})))
    assert last(run.path, "mixture/samples/") == {"captions": 96, "text": 48}
    assert last(run.path, "mixture/weight/") == pytest.approx({"captions": 2 / 3, "text": 1 / 3})
    assert values(run.path, "vift/text_steps")[-1] == 6 and values(run.path, "vift/refused")[-1] == 0
    learnt, tokens = last(run.path, "mixture/learnt/"), last(run.path, "mixture/tokens/")
    assert all(0 < learnt[name] < tokens[name] for name in SIZES)
    seen = [
        {k for k in line if k.startswith("vift/nll/")} for line in read_metrics(run.path / "metrics.jsonl")
    ]
    assert {frozenset(s) for s in seen if s} == {
        frozenset({"vift/nll/captions"}),
        frozenset({"vift/nll/text"}),
    }


def test_equal_to_the_base_mixture_it_changes_nothing(tmp_path: Path, scenes: str, data: dict) -> None:
    """Off means off, to the bit: the same schedule, and no rest in text-only steps."""
    base = {"batches": "single", "weights": {"captions": 1, "text": 2}}
    off = {"mixture": base, "freeze_vision_on_text_steps": False}
    ends = [
        train(runs.loaded(tmp_path, scenes, **changes(name, data, vift, **dataset)))
        for name, vift, dataset in (
            ("without", None, {"mixture": base}),
            ("named", off, {"mixture": base}),
            ("its own", off, {}),
            ("false", {"enabled": False, "mixture": {"weights": {"text": 1}}}, {"mixture": base}),
        )
    ]
    assert all(runs.losses(end.path) == runs.losses(ends[0].path) for end in ends)
    weights = [torch.cat([p.flatten() for p in _model(end.path)]) for end in ends]
    assert all(torch.equal(w, weights[0]) for w in weights)


def _model(run: Path) -> list[torch.Tensor]:
    return [v for _, v in sorted(load_file(run / "model" / "model.safetensors").items())]


def test_weights_may_stand_with_the_streams(tmp_path: Path, scenes: str, data: dict) -> None:
    given = streams(data, "captions", "text", captions={"weight": 1}, text={"weight": 3})
    run = train(runs.loaded(tmp_path, scenes, **changes("weights", data, {}, streams=given)))
    assert last(run.path, "mixture/samples/") == {"captions": 40, "text": 104}


def test_phases_switch_while_training(tmp_path: Path, scenes: str, data: dict) -> None:
    """0.5dur is half of the run, and begins in mid-epoch."""
    phases = [{"start": "0ba", "weights": {"captions": 1}}, {"start": "0.25dur", "weights": {"text": 1}}]
    run = train(
        runs.loaded(
            tmp_path, scenes, **changes("phases", data, {"mixture": {"phases": phases}, "log_interval": 1})
        )
    )
    assert last(run.path, "mixture/samples/") == {"captions": 40, "text": 104}
    steps = [next(k for k in line if k.startswith("vift/nll/")) for line in read_metrics(run.path / "metrics.jsonl")
             if any(k.startswith("vift/nll/") for k in line)]  # fmt: skip
    assert steps[:5] == ["vift/nll/captions"] * 5 and set(steps[5:]) == {"vift/nll/text"}


RULES = [
    {"metric": "vift/nll/captions", "above": 0.0, "weights": {"text": 1}},
    {"metric": "vift/nll/text", "below": 1e9, "weights": {"captions": 1, "text": 1}},
]


def test_rules_switch_once_each_and_a_killed_run_goes_on_the_same(
    tmp_path: Path, scenes: str, data: dict
) -> None:
    """Decisions and what they stand on are in the checkpoint: SIGKILL in mid-epoch after the first one."""
    vift = {
        "mixture": {"weights": {"captions": 1}}, "rules": RULES, "decision_interval": "4ba", "log_interval": 1,
    }  # fmt: skip
    whole = train(runs.loaded(tmp_path, scenes, **changes("whole", data, vift)))
    kinds = values(whole.path, "vift/text_steps")
    assert kinds[3] == 0 and kinds[7] == 4 and kinds[-1] > 4
    assert values(whole.path, "vift/rule") == [0, 1]
    assert last(whole.path, "mixture/weight/") == {"captions": 0.5, "text": 0.5}
    config = runs.config_file(tmp_path, scenes, "killed.yaml", **changes("killed", data, vift, 2))
    runs.killed(config, tmp_path / "runs" / "killed", 7)
    resumed = train(load([config], ["train_loader.num_workers=1"]))
    assert runs.losses(resumed.path) == runs.losses(whole.path)
    for key in ("vift/rule", "vift/text_steps"):
        assert values(resumed.path, key)[-1] == values(whole.path, key)[-1]
    assert last(resumed.path, "mixture/") == last(whole.path, "mixture/")


def test_a_rule_sees_the_evaluation_of_its_own_epoch(tmp_path: Path, scenes: str, data: dict) -> None:
    """An evaluator's number, there at the first epoch's end; killed, it decides the same again."""
    rule = {"metric": "metrics/dev/nll", "above": 0.0, "weights": {"text": 1}}
    vift = {
        "mixture": {"weights": {"captions": 1}},
        "rules": [rule],
        "decision_interval": "4ba",
        "log_interval": 1,
    }
    dev = {
        "label": "dev",
        "dataset": {"remote": data["text"], "shuffle": False},
        "num_workers": 0,
        "batch_size": 8,
    }
    body = {"eval_loaders": [dev], "eval_interval": "1ep", "max_duration": "10ba"}
    whole = train(runs.loaded(tmp_path, scenes, **{**changes("eval", data, vift), **body}))
    lines = list(read_metrics(whole.path / "metrics.jsonl"))
    assert [line["vift/rule_value"] for line in lines if "vift/rule_value" in line] == [
        next(line["metrics/dev/nll"] for line in lines if "metrics/dev/nll" in line)
    ]
    assert values(whole.path, "vift/text_steps")[:6] == [0, 0, 0, 0, 1, 2]
    config = runs.config_file(tmp_path, scenes, "k.yaml", **{**changes("killed-eval", data, vift), **body})
    runs.killed(config, tmp_path / "runs" / "killed-eval", 6)
    resumed = train(load([config], []))
    assert runs.losses(resumed.path) == runs.losses(whole.path)


def test_a_rank_that_only_fills_up_does_not_wait_for_others(
    tmp_path: Path, scenes: str, data: dict, ranks: RankPool
) -> None:
    """One stream whose samples make no whole global batch: at an epoch's end one of two ranks has none."""
    few = runs.write_scenes(tmp_path / "few", 17, stream="text")
    body = changes("few", data, {}, streams={"text": {"remote": few, "kind": "text"}})
    body |= {"max_duration": "6ba", "global_train_batch_size": 4, "device_train_microbatch_size": 2}
    ends = ranks.run("jobs:run_yaml", files=[runs.config_file(tmp_path, scenes, **body)])
    assert len(runs.losses(Path(ends[0]["folder"]))) == 6


def test_phases_in_dur_wait_for_a_duration_that_fit_says(data: dict) -> None:
    """A Trainer without one is built; ``fit(duration=...)`` brings it."""
    built = zoo.build("llava")
    model = VisionLanguageModel(built.hf, built.processor)
    dataset = StreamingVLMDataset(streams=streams(data, "captions", "text"), batch_size=8, shuffle=True)
    vift = ViFT(
        mixture={
            "phases": [
                {"start": "0ba", "weights": {"captions": 1}},
                {"start": "0.5dur", "weights": {"text": 1}},
            ]
        }
    )
    trainer = Trainer(
        model=model, algorithms=[vift], device="cpu", progress_bar=False,
        train_dataloader=vlm_data_spec(DataLoader(dataset, 8, collate_fn=jobs.collator(built))),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-4),
    )  # fmt: skip
    trainer.fit(duration="4ba")
    assert dataset.mixture is not None and [p[0] for p in dataset.mixture.phases] == [0, 2]
    assert vift.state_dict()["text_steps"] == 2
    trainer.fit(duration="2ba")  # and once more, with what is there
    assert vift.state_dict()["text_steps"] == 4
    trainer.close()


def test_a_window_that_is_not_there_is_refused_before_training(
    tmp_path: Path, scenes: str, learnt: RunFolder
) -> None:
    body = {**learning(scenes), "run_name": "window"}
    body["evaluation"] = {**body["evaluation"], "fusion": {"strength": 1, "layers": [2, 9]}}
    for start in (lambda loaded: check(loaded, Console(quiet=True)), train):
        with pytest.raises(UserError, match=r"evaluation\.fusion.*has 2 layers"):
            start(runs.loaded(tmp_path, scenes, **body))
    assert not list((tmp_path / "runs").rglob("*rank0.pt"))


def test_data_that_break_the_promise_are_refused_before_training(
    tmp_path: Path, scenes: str, data: dict
) -> None:
    wrong = (
        ({"streams": streams(data, "captions", "questions")}, {}, "dataset.streams.questions is of kind instruction"),
        ({"streams": streams(data, "captions", "questions"), "mixture": {"weights": {"captions": 1, "questions": 0.1}}}, {}, "dataset.streams.questions is of kind instruction"),
        ({"streams": streams(data, "captions", "questions")}, {"mixture": {"phases": [{"start": "0ba", "weights": {"captions": 1}}, {"start": "1ba", "weights": {"questions": 1}}]}}, "dataset.streams.questions is of kind instruction"),
        ({"streams": streams(data, "captions", "text", text={"kind": "txt"})}, {}, "did you mean 'text'"),
        ({"streams": streams(data, "captions", "text", text={"weight": 1})}, {}, "captions: it has no weight"),
        ({}, {"mixture": {"weights": {"caption": 1}}}, "algorithms.vift.mixture.weights.caption: no such stream"),
        ({}, {"rules": [{**RULES[0], "metric": "vift/nll/word"}]}, "no such stream"),
        ({}, {"rules": [{**RULES[0], "metric": "metrics/dev/nll"}]}, "no evaluator 'dev'"),
        ({}, {"mixture": {}}, "algorithms.vift.mixture: give either weights or phases"),
        ({"epoch_size": 24}, {"decision_interval": "2ba"}, "and so is epoch_size; give one"),
        ({"streams": streams(data, "text")}, {"decision_interval": "2ba"}, "there is one stream"),
        ({}, {"mixture": {"weights": {"text": 1}, "ramps": "step"}}, "algorithms.vift.mixture.ramps: unknown key"),
    )  # fmt: skip
    for dataset, vift, says in wrong:
        with pytest.raises(UserError) as error:
            train(runs.loaded(tmp_path, scenes, **changes("wrong", data, vift, **dataset)))
        assert says in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_check_says_what_training_would(tmp_path: Path, scenes: str, data: dict) -> None:
    console = Console(quiet=True)
    good = changes("check", data, {"mixture": {"weights": {"captions": 2, "text": 1}}})
    check(runs.loaded(tmp_path, scenes, **good), console)
    silent = {"mixture": {"weights": {"captions": 2, "text": 1, "questions": 0}}}
    unasked = changes("check", data, {}, streams=streams(data, "captions", "text", "questions"), **silent)
    check(runs.loaded(tmp_path, scenes, **unasked), console)
    bad = changes("check", data, {}, streams=streams(data, "text", "questions"))
    with pytest.raises(UserError, match=r"algorithms\.vift.*kind instruction"):
        check(runs.loaded(tmp_path, scenes, **bad), console)


def test_a_question_beside_a_picture_stops_the_run_and_is_named(
    tmp_path: Path, scenes: str, data: dict
) -> None:
    """The stream says that it holds captions; its samples say otherwise."""
    lies = {
        "captions": {"remote": data["questions"], "kind": "caption"},
        "text": {"remote": data["text"], "kind": "text"},
    }
    with pytest.raises(UserError, match=r"(?s)8 of captions; such as 'scenes/uniform/.*' of captions"):
        train(runs.loaded(tmp_path, scenes, **changes("lies", data, {}, streams=lies)))
    pictures = {
        "captions": {"remote": data["captions"], "kind": "caption"},
        "text": {"remote": data["questions"], "kind": "text"},
    }
    with pytest.raises(UserError, match="of text; such as"):
        train(runs.loaded(tmp_path, scenes, **changes("lies2", data, {}, streams=pictures)))


def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr("sys.argv", ["opsin", *words])
    try:
        cli.main()
        code: Any = 0
    except SystemExit as left:
        code = left.code or 0
    said = capsys.readouterr()
    return int(code), said.out, said.err


def learning(scenes: str) -> dict[str, Any]:
    """Changes of a small run that learns to answer some questions about pictures."""
    return {
        "run_name": "learnt", "max_duration": "60ba", "optimizer": {"name": "adamw", "lr": 4e-3},
        "evaluation": {"dataset": {"remote": scenes, "shuffle": False}, "limit": 8, "pictures": 0,
                       "fusion": {"strength": 0.5}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> RunFolder:
    return train(runs.loaded(tmp_path_factory.mktemp("learnt"), scenes, **learning(scenes)))


def test_fusion_is_reached_from_the_command_line(
    tmp_path: Path,
    scenes: str,
    learnt: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run, body = learnt, learning(scenes)
    summary = json.loads(run.summary.read_text())
    assert {"fused", "no_picture", "trained", "blind"} <= set(summary["all"])
    own = run.summary.read_text()
    code, out, err = typed(monkeypatch, capsys, "eval", str(run.path), "--fuse", "2", "--fuse-layers", "0-2")
    assert code == 0 and "fused" in out, err
    assert run.summary.read_text() == own and list((run.path / "eval").glob("*.json"))
    picture = tmp_path / "a.png"
    picture.write_bytes(unpack_images(sample(SceneConfig(), 1, "uniform", 0, "vqa")["images"])[0])
    answers = []
    for more in ((), ("--fuse", "0"), ("--fuse", "40", "--fuse-ratio", "0")):
        words = ("generate", str(run.path), "What colour is the object?", "--image", str(picture), *more)
        code, out, err = typed(monkeypatch, capsys, *words)
        assert code == 0, err
        answers.append(out)
    assert answers[0] == answers[1] != answers[2]
    for more, says in (
        (("--fuse-ratio", "0"), "--fuse is missing"),
        (("--fuse", "1", "--fuse-layers", "half"), "--fuse-layers 'half': use FIRST-END"),
        (("--fuse", "1", "--fuse-layers", "1-9"), "has 2 layers"),
        (("--fuse", "1", "--fuse-align", "sufix"), "did you mean 'suffix'"),
        (("--fuse", "nan"), "fusion.strength: nan"),
    ):
        for command in (
            ("generate", str(run.path), "What?", "--image", str(picture)),
            ("eval", str(run.path)),
        ):
            code, out, err = typed(monkeypatch, capsys, *command, *more)
            assert code == 2 and says in err and err.count("\n") == 1, (command, more, err)
    code, _, err = typed(monkeypatch, capsys, "generate", str(run.path), "What?", "--fuse", "1")
    assert code == 2 and "nothing to fuse" in err
    wrong = {**body, "evaluation": {**body["evaluation"], "fusion": {"strenght": 1}}}
    with pytest.raises(UserError, match=r"evaluation\.fusion.*did you mean 'strength'"):
        train(runs.loaded(tmp_path, scenes, **wrong))


def test_fused_answers_of_no_strength_score_as_the_packed_ones(scenes: str, learnt: RunFolder) -> None:
    """Both tables stand on one definition: greedy decoding gives the answer."""
    model, collator = open_model(str(learnt.path), None)
    dataset = StreamingVLMDataset(remote=scenes, batch_size=1, shuffle=False)
    samples = [dataset[i] for i in range(24)]
    packed, decoded = score(model, collator, samples), score_fused(model, collator, samples, None)
    assert packed == decoded and 0 < sum(s.right for s in packed) < len(packed)
