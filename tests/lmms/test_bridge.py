"""lmms-eval for real, offline: what it says of a model is what the model's own answers, scored here, say."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if find_spec("lmms_eval") is None:
    pytest.skip("lmms-eval is not installed; `make test-eval` has it", allow_module_level=True)

from opsin.algorithms.vift.fusion import Fusion
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.lmms.inside import ask_inside
from opsin.evaluation.lmms.run import run_lmms
from opsin.evaluation.lmms.tasks import write_tasks
from opsin.models.errors import UserError

SUFFIX = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def ran(place: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of all tasks, in two processes that share 19 documents."""
    out = tmp_path_factory.mktemp("ran")
    return run_lmms(
        str(place.model),
        out,
        local=place.local,
        device="cpu",
        batch_size=4,
        processes=2,
        model_args={"max_new_tokens": 9},
    )


@pytest.fixture(scope="module")
def failing(ran: Any, place: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Future, Path]]:
    """A run of a task that is none (a measure has this name), which goes on beside the tests in this process."""
    out = tmp_path_factory.mktemp("failing")
    with ThreadPoolExecutor(1) as thread:
        yield (
            thread.submit(run_lmms, str(place.model), out, tasks="pope_accuracy", device="cpu", offline=True),
            out,
        )


@pytest.fixture(scope="module")
def tasks(failing: Any, place: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, place.local)
    return folder


def samples_of(ran: dict[str, Any], task: str) -> list[dict[str, Any]]:
    lines = Path(ran["folder"], ran["tasks"][task]["samples"]).read_text(encoding="utf-8").splitlines()
    return sorted(map(json.loads, lines), key=lambda one: one["doc_id"])


def values(entry: dict[str, Any]) -> dict[str, float]:
    return {name: measure["value"] for name, measure in entry["measures"].items()}


def test_lmms_eval_finds_our_models_without_torch() -> None:
    from lmms_eval.models import get_model

    from opsin.evaluation.lmms.wrapper import Opsin, OpsinChat

    (point,) = entry_points(group="lmms_eval.models", name="opsin")
    assert [m.model_id for m in point.load()()] == ["opsin", "opsin_chat"]
    assert (get_model("opsin"), get_model("opsin_chat")) == (Opsin, OpsinChat)
    code = "import sys, opsin.evaluation.lmms.manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pope_is_scored_by_lmms_evals_rule_on_our_answers(place: Any, ran: dict[str, Any]) -> None:
    rows = place.rows["our_presence"]
    said = [place.answer(row["text"] + SUFFIX, i) for i, row in enumerate(rows)]
    gold = [row["label"] for row in rows]
    assert {"yes", "no"} <= set(said)
    pairs = list(zip(gold, said, strict=True))
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("no", "yes"))
    found = ran["tasks"]["our_presence"]
    assert [one["filtered_resps"] for one in samples_of(ran, "our_presence")] == said
    assert found["n"] == len(rows) == 19
    numbers = values(found)
    assert numbers["pope_accuracy"] == pytest.approx(sum(g == s for g, s in pairs) / 19)
    assert 0 < numbers["pope_accuracy"] < 1
    assert numbers["pope_precision"] == pytest.approx(tp / (tp + fp))
    assert numbers["pope_recall"] == pytest.approx(tp / (tp + pairs.count(("yes", "no"))))
    assert numbers["pope_yes_ratio"] == pytest.approx(gold.count("yes") / 19)  # theirs is of the gold answers
    assert found["measures"]["pope_recall"]["standard_error"] is None


def test_choices_are_ranked_by_the_adapters_likelihoods(place: Any, ran: dict[str, Any]) -> None:
    right = by_length = 0
    for i, (row, sample) in enumerate(
        zip(place.rows["our_colours"], samples_of(ran, "our_colours"), strict=True)
    ):
        nats = place.nats(row["question"], i, row["choices"])
        assert [float(one[0]) for one in sample["filtered_resps"]] == pytest.approx(
            [-n.sum for n in nats], abs=1e-4
        )
        assert [one[1] == "True" for one in sample["filtered_resps"]] == [n.greedy for n in nats]
        gold = "ABC".index(row["answer"])
        each = [n.sum / len(c) for n, c in zip(nats, row["choices"], strict=True)]
        right += int(np.argmax([n.sum for n in nats])) == gold
        by_length += int(np.argmax(each)) == gold
    numbers = values(ran["tasks"]["our_colours"])
    assert numbers["acc"] == pytest.approx(right / 19)
    assert numbers["acc_norm"] == pytest.approx(by_length / 19)
    assert ran["tasks"]["our_colours"]["measures"]["acc"]["standard_error"] > 0


def test_two_pictures_marked_or_in_front_and_several_right_answers(place: Any, ran: dict[str, Any]) -> None:
    right = 0
    for i, (row, sample) in enumerate(zip(place.rows["our_two"], samples_of(ran, "our_two"), strict=True)):
        said = place.answer(row["question"] + SUFFIX, i, i + 1)
        assert sample["filtered_resps"] == said
        right += said.lower() in [a.lower().rstrip(".") for a in row["answers"]]
    assert values(ran["tasks"]["our_two"]) == {"exact_match": pytest.approx(right / 7)}
    assert 0 < right < 7


def test_a_run_leaves_its_log_its_tasks_and_no_copies(place: Any, ran: dict[str, Any]) -> None:
    folder = Path(ran["folder"])
    assert sorted(p.name for p in folder.iterdir()) == ["lmms_eval.log", "output", "tasks"]
    assert not (folder / "tasks" / "our_parquet.parquet").exists()  # used as it lies
    assert not (folder / "tasks" / "cache").exists()
    assert ran["tasks"]["our_parquet"]["n"] == 3 and ran["lmms_eval"] == "0.7.3"


def test_names_are_looked_up_before_a_run_starts(place: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task pop_full: unknown to lmms-eval; did you mean 'pope_full'"):
        run_lmms(str(place.model), tmp_path, tasks=["pop_full"])
    with pytest.raises(UserError, match="task pope: lmms-eval has a task of this name"):
        run_lmms(str(place.model), tmp_path, local={"pope": place.local["our_presence"]})
    with pytest.raises(UserError, match=r"task ours: form 'popes': unknown; did you mean 'pope'"):
        run_lmms(str(place.model), tmp_path, local={"ours": {"form": "popes", "path": "x.json"}})


def test_inside_a_process_nothing_is_touched_and_numbers_are_the_same(
    place: Any, ran: dict[str, Any], tasks: Path
) -> None:
    random.seed(1)
    np.random.seed(1)
    timeout = torch.distributed.distributed_c10d.default_pg_timeout
    place.adapter.model.train()
    names = ["our_presence", "our_colours"]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = ask_inside(place.adapter, tasks, names)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert torch.distributed.distributed_c10d.default_pg_timeout == timeout
    assert place.adapter.model.training
    place.adapter.model.eval()
    assert {n: values(e) for n, e in found["tasks"].items()} == {n: values(ran["tasks"][n]) for n in names}
    assert ask_inside(place.adapter, tasks, names[:1], limit=5)["tasks"]["our_presence"]["n"] == 5
    with pytest.raises(UserError, match="has no task our_absence; there are our_colours"):
        ask_inside(place.adapter, tasks, ["our_absence"])


def asked_by(model: Any, tasks: Path, task: str) -> list[str]:
    """Answers to a task, by a wrapper in this process."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=TaskManager("ERROR", include_path=[str(tasks)], include_defaults=False),
        distributed_executor_backend="torchrun",
    )
    return [one["filtered_resps"][0] for one in found["samples"][task]]


def test_messages_ask_the_same(place: Any, ran: dict[str, Any], tasks: Path) -> None:
    from opsin.evaluation.lmms.wrapper import OpsinChat

    said = asked_by(OpsinChat(adapter=place.adapter), tasks, "our_presence")
    assert said == [one["filtered_resps"] for one in samples_of(ran, "our_presence")]


def test_ability_fusion_by_arguments_and_memory_given_back(place: Any, tasks: Path) -> None:
    from opsin.evaluation.lmms.wrapper import Opsin

    arguments = f'pretrained="{place.model}",fuse=40,fuse_layers=1-4,fuse_ratio=0.5'
    model = Opsin.create_from_arg_string(arguments, {"batch_size": "8", "device": "cpu"})
    fused = VLMAdapter(place.adapter.model, place.adapter.collator, fusion=Fusion(40, 0.5, (1, 4)))
    rows = place.rows["our_presence"]
    said = [place.answer(row["text"] + SUFFIX, i, adapter=fused) for i, row in enumerate(rows)]
    assert asked_by(model, tasks, "our_presence") == said
    assert said != [place.answer(row["text"] + SUFFIX, i) for i, row in enumerate(rows)]
    with pytest.raises(UserError, match="let go after its requests"):  # by ``clean``
        asked_by(model, tasks, "our_parquet")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "pretrained=FOLDER is missing"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size 'auto'"),
        ({"pretrained": "x", "precision": "bf16"}, "precision=bf16: unknown; did you mean 'amp_bf16'"),
        ({"pretrained": "x", "fuse_ratio": 2.0}, "fuse is missing"),
        ({"pretrained": "x", "fuse": 1.0, "fuse_layers": 3}, "fuse_layers=3: use FIRST-END"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], line: str) -> None:
    from opsin.evaluation.lmms.wrapper import Opsin

    with pytest.raises(UserError, match=line):
        Opsin(**arguments)


@pytest.mark.usefixtures("own_cache")
def test_files_in_object_storage_are_fetched(place: Any, s3: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    given = Path(place.local["our_presence"]["images"])
    (s3 / "data" / "pope").mkdir()
    for file in (*(given / f"{i}.png" for i in range(2)), Path(place.local["our_parquet"]["path"])):
        (s3 / "data" / "pope" / file.name).write_bytes(file.read_bytes())
    rows = [json.dumps(row) for row in place.rows["our_presence"][:2]]
    (s3 / "data" / "pope" / "two.jsonl").write_text("\n".join(rows), encoding="utf-8")
    at = "s3://data/pope/"
    made = {
        "made": {"form": "pope", "path": at + "two.jsonl"},
        "fetched": {"form": "pope", "path": at + "as_it_lies.parquet"},
    }
    write_tasks(tmp_path, made)
    found = pq.read_table(tmp_path / "made.parquet").to_pylist()
    assert [row["image"]["bytes"] for row in found] == [(given / f"{i}.png").read_bytes() for i in range(2)]
    assert os.environ["OPSIN_CACHE"] in (tmp_path / "fetched.yaml").read_text(encoding="utf-8")
    assert not (tmp_path / "fetched.parquet").exists()


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question": "<image> <image> which?", "answers": ["a"], "images": ["0.png"]}, "2 <image> marks in the words, 1 pictures"),
        ({"question": "what " * 600, "answers": ["a"], "images": ["0.png"]}, "tokens, more than 512"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_asked_is_named(
    place: Any, tmp_path: Path, row: dict[str, Any], line: str
) -> None:
    fine = {"question": "Is it?", "answers": ["a"], "images": ["1.png"]}
    (tmp_path / "odd.jsonl").write_text(json.dumps(fine) + "\n" + json.dumps(row), encoding="utf-8")
    images = place.local["our_two"]["images"]
    write_tasks(
        tmp_path / "tasks", {"odd": {"form": "open", "path": str(tmp_path / "odd.jsonl"), "images": images}}
    )
    with pytest.raises(UserError, match=rf"task odd, document 1: .*{line}"):
        ask_inside(place.adapter, tmp_path / "tasks", ["odd"])


def test_a_failed_task_is_an_error_though_lmms_eval_ends_with_0(failing: tuple[Future, Path]) -> None:
    run, out = failing
    error = run.exception()
    assert isinstance(error, UserError)
    assert re.match(
        r"lmms-eval: no results for pope_accuracy: ValueError: Tasks not found: pope_accuracy", str(error)
    )
    (folder,) = out.iterdir()
    assert "Traceback" in (folder / "lmms_eval.log").read_text(encoding="utf-8")
