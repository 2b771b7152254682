"""Whole small runs: stages, resumption, toggles, what stops them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opsin.models.errors import UserError
from opsin.models.export import load_model
from opsin.training.config import load
from opsin.training.metrics_file import read_metrics
from opsin.training.train import train

import runs

L2T = {"l2t": {"lambda_instruction": 0.3, "turns": "first"}}


def _losses(folder: Path) -> list[float]:
    return runs.losses(folder)


def test_a_run_leaves_what_later_tools_read(tmp_path: Path, scenes: str) -> None:
    evaluation = {
        "dataset": {"remote": scenes, "shuffle": False},
        "majority_from": {"remote": scenes, "shuffle": False},
        "limit": 12,
        "pictures": 4,
    }
    folder = train(runs.loaded(tmp_path, scenes, algorithms=L2T, evaluation=evaluation))
    assert load([str(folder.config)]).run.algorithms["l2t"]["turns"] == "first"
    lines = read_metrics(folder.metrics)
    assert [line["step"] for line in lines] == list(range(1, 13)) and {line["stage"] for line in lines} == {
        "instruct"
    }
    assert {"loss/train/total", "loss/train/lm", "l2t/loss_I", "l2t/loss_A", "time/token"} <= set(lines[0])
    summary = json.loads(folder.summary.read_text())
    row = summary["by_kind"]["colour"]
    assert set(row) == {"n", "trained", "blind", "n_blind", "blind_blank", "majority", "standard_error"}
    assert row["n"] > 0
    assert (
        summary["seed"] == 3 and summary["versions"]["torch"] == torch.__version__ and summary["seconds"] > 0
    )
    assert folder.samples.stat().st_size > 10_000
    report = json.loads((folder.stage("instruct") / "l2t_templates.json").read_text())
    assert report["source"] == "dataset" and report["templates"][0]["sentence"] == "answer briefly"
    assert 0 < report["share_of_instruction_words_removed"] < 0.5
    assert list(folder.checkpoints("instruct").glob("*.pt"))
    # A second call finds everything done.
    before = folder.metrics.read_text()
    assert (
        train(runs.loaded(tmp_path, scenes, algorithms=L2T, evaluation=evaluation)).metrics.read_text()
        == before
    )


def test_l2t_false_is_the_run_in_which_it_was_never_named(tmp_path: Path, scenes: str) -> None:
    named = train(runs.loaded(tmp_path, scenes, "algorithms.l2t=false", "run_name=without", algorithms=L2T))
    never = train(runs.loaded(tmp_path, scenes, "run_name=never"))
    on = train(runs.loaded(tmp_path, scenes, "algorithms.l2t=true", "run_name=with", algorithms=L2T))
    assert _losses(named.path) == _losses(never.path)
    assert _losses(on.path) != _losses(never.path)


def test_stages_chain_and_finished_ones_are_shared(tmp_path: Path, scenes: str) -> None:
    stages = {"align": {"chat_template": "plain", "max_duration": "3ba"}, "instruct": {"max_duration": "3ba"}}
    first = train(runs.loaded(tmp_path, scenes, stages=stages, algorithms=L2T))
    align = load_model(first.stage("align") / "model")
    second = train(
        runs.loaded(
            tmp_path, scenes, "run_name=second", "algorithms.l2t=false", stages=stages, algorithms=L2T
        )
    )
    taken = json.loads((second.stage("align") / "done.json").read_text())
    assert "small" in taken["taken_from"]
    assert {line["stage"] for line in read_metrics(second.metrics)} == {"instruct"}
    shared = load_model(second.stage("align") / "model")
    assert all(
        torch.equal(a, b)
        for a, b in zip(align.state_dict().values(), shared.state_dict().values(), strict=True)
    )
    # From a run, from a stage of a run, from a folder.
    for i, start in enumerate(("small", "small@align", str(first.model))):
        again = train(
            runs.loaded(tmp_path, scenes, f"init_from={start}", f"run_name=again{i}", max_duration="1ba")
        )
        assert (again.model / "config.json").is_file()
    with pytest.raises(
        UserError,
        match="init_from 'smal': no stage, run, checkpoint or folder with a model; did you mean 'small'",
    ):
        train(runs.loaded(tmp_path, scenes, "init_from=smal", "run_name=lost"))


def test_another_configuration_under_the_same_name_is_refused(tmp_path: Path, scenes: str) -> None:
    train(runs.loaded(tmp_path, scenes, max_duration="1ba"))
    with pytest.raises(UserError, match="holds a run with other settings") as error:
        train(runs.loaded(tmp_path, scenes, "seed=9", max_duration="1ba"))
    assert "init_from" in str(error.value)


def test_a_killed_run_resumes_with_the_same_losses(tmp_path: Path, scenes: str) -> None:
    """SIGKILL in mid-epoch, twice, with workers; the remaining losses equal those of a run that was not killed."""
    changes = {"algorithms": L2T, "train_loader": {"num_workers": 2}, "max_duration": "14ba"}
    whole = train(runs.loaded(tmp_path, scenes, "run_name=whole", **changes))
    config = runs.config_file(tmp_path, scenes, "killed.yaml", **{**changes, "run_name": "killed"})
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    for steps in (6, 10):
        runs.killed(config, metrics.parent, steps)
    resumed = train(load([config]))
    lines = read_metrics(resumed.metrics)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert _losses(resumed.path) == _losses(whole.path)
    names = ("l2t/loss_I", "l2t/n_I")
    assert [[a[n] for n in names] for a in lines] == [
        [b[n] for n in names] for b in read_metrics(whole.metrics)
    ]


def test_activation_checkpointing_changes_no_number(tmp_path: Path, scenes: str) -> None:
    plain = train(runs.loaded(tmp_path, scenes, "run_name=plain", max_duration="2ba"))
    saved = train(
        runs.loaded(tmp_path, scenes, "run_name=saved", "activation_checkpointing=true", max_duration="2ba")
    )
    assert _losses(plain.path) == pytest.approx(_losses(saved.path), abs=1e-6)


def test_bf16_autocast_on_a_cpu_is_close_to_fp32(tmp_path: Path, scenes: str) -> None:
    full = train(runs.loaded(tmp_path, scenes, "run_name=full", max_duration="2ba"))
    half = train(runs.loaded(tmp_path, scenes, "run_name=half", "precision=amp_bf16", max_duration="2ba"))
    assert _losses(full.path) == pytest.approx(_losses(half.path), rel=0.02) and _losses(
        full.path
    ) != _losses(half.path)


def test_packing_in_a_run_gives_the_same_losses(tmp_path: Path, scenes: str) -> None:
    plain = train(runs.loaded(tmp_path, scenes, "run_name=plain", max_duration="2ba"))
    packed = train(
        runs.loaded(tmp_path, scenes, "run_name=packed", "train_loader.packing=true", max_duration="2ba")
    )
    assert _losses(plain.path) == pytest.approx(_losses(packed.path), abs=1e-5)


def test_callbacks_loggers_optimizers_and_composers_algorithms_by_name(tmp_path: Path, scenes: str) -> None:
    folder = train(
        runs.loaded(
            tmp_path, scenes, max_duration="2ba",
            callbacks={"speed_monitor": {"window_size": 1}, "lr_monitor": {}},
            loggers={"tensorboard": {"log_dir": str(tmp_path / "tb")}, "file": {"filename": str(tmp_path / "log.txt")}},
            algorithms={"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 0.1}},
            optimizer={"name": "decoupled_adamw", "lr": 1e-3, "weight_decay": 1e-5},
            lr_by_part={"mm_projector": 2e-3},
            scheduler={"name": "cosine_with_warmup", "t_warmup": "1ba"},
            eval_loaders=[{"label": "held", "dataset": {"remote": scenes, "shuffle": False}, "limit": 16, "num_workers": 0}],
            eval_interval="1ba",
        )
    )  # fmt: skip
    line = read_metrics(folder.metrics)[-1]
    assert 0 <= line["metrics/held/exact_match"] <= 1 and line["metrics/held/nll"] > 0
    assert any(k.startswith("lr-") for k in line)
    assert list((tmp_path / "tb").rglob("events*")) and (tmp_path / "log.txt").is_file()


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["algorithms.l2tt=true"], "algorithms.l2tt: unknown algorithm 'l2tt'; did you mean 'l2t'"),
        ({}, ["algorithms.l2t.turn=all"], "algorithms.l2t.turn: unknown key; did you mean 'turns'"),
        ({}, ["algorithms.l2t.lambda_instruction=high"], "algorithms.l2t.lambda_instruction: expected float"),
        ({}, ["algorithms.l2t.stages=[instrukt]"], "algorithms.l2t.stages: no stage 'instrukt'; did you mean 'instruct'"),
        ({}, ["model.name=scenes_lava"], "model.name: unknown model 'scenes_lava'; did you mean 'scenes_llava'"),
        ({}, ["model.hiden_size=3"], "model.hiden_size: unknown key; did you mean 'hidden_size'"),
        ({}, ["optimizer.name=adamww"], "optimizer.name: unknown optimizer 'adamww'; did you mean 'adamw'"),
        ({}, ["scheduler.t_warmpu=3ba"], "scheduler.t_warmpu: unknown key"),
        ({}, ["callbacks.speed_monitr={}"], "callbacks.speed_monitr: unknown callback"),
        ({}, ["chat_template=vicuna"], "chat_template 'vicuna': unknown; did you mean 'vicuna_v1'"),
        ({}, ["lr_by_part.vision_towr=1"], "lr_by_part.vision_towr: unknown part; did you mean 'vision_tower'"),
        ({}, ["trainable.vision_tower=false", "lr_by_part.vision_tower=1"], "this part is frozen"),
        ({}, ["parallelism_config.fsdp={}"], "parallelism_config.fsdp: unknown key; did you mean 'fsdp2'"),
        ({}, ["global_train_batch_size=640", "train_loader.drop_last=true"], "make no batch of 640"),
        ({}, ["run_name=a/b"], "run_name 'a/b'"),
        ({}, ["model.language_model=nowhere.safetensors"], "no file 'nowhere.safetensors'"),
        ({"algorithms": {"l2t": {}}}, ["chat_template=plain"], "algorithms.l2t: does not work with chat_template: plain"),
        ({"train_loader": {"num_workers": 0, "dataset": {"remote": "no/such/folder"}}}, [], "no MDS dataset at 'no/such/folder'"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_before_anything_is_trained(
    tmp_path: Path, scenes: str, changes: dict, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        train(runs.loaded(tmp_path, scenes, *arguments, **changes))
    assert message in str(error.value), error.value
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("runs/*/checkpoints/*/*.pt"))


def test_a_method_without_pictures_to_act_on_is_refused(tmp_path: Path) -> None:
    text = runs.write_scenes(tmp_path / "text", stream="text")
    with pytest.raises(UserError, match="have no picture, so there is nothing for it to act on"):
        train(runs.loaded(tmp_path, text, algorithms=L2T))


def test_bad_samples_are_named_and_too_many_stop_the_run(tmp_path: Path) -> None:
    from streaming import MDSWriter

    from opsin.data.scenes import SceneConfig, sample
    from opsin.data.schema import COLUMNS

    import jobs  # noqa: F401  (filters warnings)

    config = SceneConfig(objects=(1, 2), charts=0, sign=0, questions=2, kinds=("colour",))
    with MDSWriter(out=str(tmp_path / "bad"), columns=COLUMNS, hashes=["xxh64"]) as writer:
        for i in range(96):
            record = sample(config, 1, "uniform", i)
            if i >= 48 and i % 8 == 0:
                record["images"] = record["images"][:40]
            writer.write(record)
    data = str(tmp_path / "bad")
    # Preflight looks at the first samples only; the guard counts during the run.
    with pytest.raises(
        UserError, match=r"of 96 samples cannot be used \(6 unreadable_image\).*skipped\.jsonl"
    ):
        train(
            runs.loaded(
                tmp_path,
                data,
                "preflight.max_skipped=0.01",
                max_duration="1ep",
                train_loader={"dataset": {"remote": data, "shuffle": False}},
            )
        )
    named = [json.loads(line) for line in (tmp_path / "runs/small/skipped.jsonl").read_text().splitlines()]
    assert len(named) == 6 and all(
        n["reason"] == "unreadable_image" and n["id"].startswith("scenes/") for n in named
    )
    folder = train(
        runs.loaded(tmp_path, data, "preflight.max_skipped=0.5", "run_name=patient", max_duration="1ep")
    )
    last = read_metrics(folder.metrics)[-1]
    assert last["data/skipped"] == 6 == last["data/skipped_unreadable_image"]
