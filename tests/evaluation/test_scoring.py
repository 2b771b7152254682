"""The end of a run: scored by all ranks, with bad samples, over several processes; what is refused before it begins."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console
from streaming import MDSWriter

from opsin.data.schema import COLUMNS, pack_images
from opsin.models.errors import UserError
from opsin.training import scoring, wall_time
from opsin.training.finished import ask, evaluate_run, export_run
from opsin.training.run_folder import RunFolder
from opsin.training.scoring import check_evaluation
from opsin.training.train import train

import runs
import zoo


def written(out: Path, samples: list[dict], columns: dict[str, str] = COLUMNS) -> str:
    """A dataset of these samples; returns its address."""
    with MDSWriter(out=str(out), columns=columns, hashes=["xxh64"]) as writer:
        for sample in samples:
            writer.write({k: sample[k] for k in columns})
    return str(out)


def data(remote: str) -> dict:
    return {"remote": remote, "shuffle": False}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def scores(folder: Path) -> dict:
    summary = json.loads((folder / "summary.json").read_text())
    return {k: summary[k] for k in ("by_kind", "all", "questions", "left_out", "skipped")}


@pytest.mark.world
def test_two_ranks_score_what_one_process_scores(ranks, tmp_path: Path, scenes: str) -> None:
    # 11 samples in batches of 4 leave the ranks with unequal shares.
    evaluation = {
        "dataset": data(scenes),
        "majority_from": data(scenes),
        "limit": 11,
        "batch_size": 4,
        "pictures": 2,
    }
    config = runs.config_file(
        tmp_path, scenes, evaluation=evaluation, max_duration="30ba", save_interval="30ba",
        optimizer={"name": "adamw", "lr": 5e-3},
    )  # fmt: skip
    folder = Path(ranks.run("jobs:run_yaml", timeout=240, files=[config])[0]["folder"])
    together = scores(folder)
    assert (folder / "samples.png").stat().st_size > 5_000
    assert together["questions"] == together["all"]["n"] == 22 and together["skipped"] == {}
    assert together["all"]["trained"] > 0 and together["all"]["majority"] > 0
    before = json.loads((folder / "summary.json").read_text())
    evaluate_run(folder, None, None, quiet())
    assert scores(folder) == together
    after = json.loads((folder / "summary.json").read_text())
    assert after["seconds"] == before["seconds"] > 0 and after["stages"] == before["stages"]


def test_bad_held_out_samples_are_named_and_the_run_ends(
    tmp_path: Path, scenes: str, trained: RunFolder
) -> None:
    good = [{**zoo.sample(i, turns=2), "meta": {"kinds": ["colour", "size"]}} for i in range(3)]
    bad = [
        {**zoo.sample(3), "images": pack_images([b"no picture"])},
        {**zoo.sample(4, turns=2), "meta": {"kinds": ["colour"]}},
        {**zoo.sample(5), "images": pack_images([])},
        {**zoo.sample(6), "conversations": [{"from": "human", "value": "?"}]},
    ]
    long = zoo.sample(7, turns=40)
    held_out = written(tmp_path / "held-out", [bad[0], *good, *bad[1:], long])
    evaluation = {"dataset": data(held_out), "majority_from": data(held_out), "pictures": 8}
    console = quiet()
    run = runs.loaded(tmp_path, scenes, evaluation=evaluation, max_duration="1ba")
    folder = train(run, console)
    found = scores(folder.path)
    assert found["skipped"] == {
        "bad_conversation": 1,
        "bad_kinds": 1,
        "image_count": 1,
        "unreadable_image": 1,
    }
    assert found["left_out"] > 0 and found["questions"] + found["left_out"] == 3 * 2 + 40
    assert found["all"]["n"] == found["questions"] and found["by_kind"]["size"]["n"] == 3
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert f"exact match on {found['questions']} questions of 4 held-out samples" in said
    assert f"{found['left_out']} of their questions do not fit into max_seq_len" in said
    assert (
        "4 samples cannot be used (1 bad_conversation, 1 bad_kinds, 1 image_count, 1 unreadable_image)"
        in said
    )
    named = [json.loads(line) for line in folder.skipped.read_text().splitlines()]
    assert {n["id"] for n in named} == {b["id"] for b in bad} and {n["data"] for n in named} == {"evaluation"}
    assert folder.samples.is_file()
    # Scores of other data name them beside their own summary.
    other = RunFolder(trained.root, trained.path.name)
    evaluate_run(other.path, held_out, None, quiet())
    assert list((other.path / "eval").glob("*.skipped.jsonl")) and not other.skipped.exists()


def test_the_summary_is_there_when_the_sheet_cannot_be_drawn(
    tmp_path: Path, scenes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no sheet")

    monkeypatch.setattr(scoring, "draw_samples", fail)
    run = runs.loaded(tmp_path, scenes, evaluation={"dataset": data(scenes), "limit": 2}, max_duration="1ba")
    with pytest.raises(RuntimeError, match="no sheet"):
        train(run)
    assert scores(Path(run.run.run_root) / "small")["questions"] == 4


@pytest.mark.parametrize("key", ["dataset", "majority_from"])
def test_evaluation_data_that_cannot_be_read_stops_the_run_before_it_begins(
    tmp_path: Path, scenes: str, key: str
) -> None:
    columns = {k: v for k, v in COLUMNS.items() if k != "images"}
    narrow = written(tmp_path / "narrow", [zoo.sample(0)], columns)
    torn = written(tmp_path / "torn", [zoo.sample(0)])
    next(Path(torn).glob("*.mds")).unlink()
    for remote, message in (
        (str(tmp_path / "nowhere"), "no MDS dataset at"),
        (narrow, "column 'images' is not there in shard.00000.mds"),
        (torn, "shard.00000.mds is not there, the index names it"),
    ):
        evaluation = {"dataset": data(scenes), key: data(remote)}
        run = runs.loaded(tmp_path, scenes, evaluation=evaluation)
        with pytest.raises(UserError) as error:
            train(run)
        said = str(error.value)
        assert f"evaluation.{key}: dataset: " in said and message in said and "\n" not in said
        assert not (tmp_path / "runs").exists()


def test_check_is_lenient_about_data_that_is_not_there_yet(tmp_path: Path, scenes: str) -> None:
    later = str(tmp_path / "later")
    prepare = {"scenes": [{"out": later, "split": "uniform", "samples": 4}]}
    run = runs.loaded(tmp_path, scenes, evaluation={"dataset": data(later)}, prepare=prepare)
    check_evaluation(run, strict=False)
    with pytest.raises(UserError, match="no MDS dataset"):
        check_evaluation(run)
    check_evaluation(runs.loaded(tmp_path, scenes))
    for key, value in (("limit", 0), ("batch_size", 0), ("pictures", -1)):
        run = runs.loaded(tmp_path, scenes, evaluation={"dataset": data(scenes), key: value})
        with pytest.raises(UserError, match=rf"evaluation\.{key}: {value}: use"):
            check_evaluation(run, strict=False)


def test_mistakes_with_a_finished_run_are_one_line(tmp_path: Path, scenes: str, trained: RunFolder) -> None:
    run = trained.path
    (tmp_path / "file").write_text("")
    picture = tmp_path / "picture.png"
    picture.write_bytes(zoo.picture(1, (96, 96)))
    for mistake, message in (
        (lambda: evaluate_run(run, scenes, 0, quiet()), "--limit 0: use 1 or more"),
        (lambda: evaluate_run(run, scenes, -3, quiet()), "--limit -3: use 1 or more"),
        (lambda: ask(str(run), "?", [], None, 0), "--max-new-tokens 0: use 1 or more"),
        (lambda: ask(str(run), "<image> ?", [], None, 4), "prompt: 1 image marks in the questions, 0 pictures"),
        (lambda: ask(str(run), "what " * 5000, [picture], None, 4), "prompt: the prompt has"),
        (lambda: export_run(run, tmp_path / "file", quiet()), "is a file; choose a new folder"),
        (lambda: export_run(run, tmp_path / "file" / "in" / "it", quiet()), "cannot be written (Not a directory)"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            mistake()
        assert message in str(error.value) and "\n" not in str(error.value)


def test_wall_time_is_summed_over_processes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "run")
    folder.path.mkdir()
    assert wall_time.seconds(folder) is None
    wall_time.end(folder)  # of a run from before times were noted
    assert wall_time.seconds(folder) is None
    wall_time.begin(folder, 1000.0)
    folder.metrics.write_text("{}\n")
    os.utime(folder.metrics, (1060.0, 1060.0))  # killed after its last step, a minute in
    wall_time.begin(folder, 5000.0)
    assert wall_time.seconds(folder) == 60.0  # ... and the second one was killed before its first step
    wall_time.begin(folder, time.time() - 5.0)
    wall_time.end(folder)
    assert wall_time.seconds(folder) == pytest.approx(65.0, abs=1.0)
