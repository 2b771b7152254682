"""A loss or gradient that is no number: stopped, or left out, on all ranks, before anything holds what came of it."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from opsin.data.patch_targets import COLUMN, DESCRIPTION, pack, unpack
from opsin.data.schema import COLUMNS, HASHES, pack_images, stable_hash
from opsin.data.sentences import dataset_hash
from opsin.data.streaming import StreamingVLMDataset
from opsin.models.errors import UserError
from opsin.training import cli, latents
from opsin.training.metrics_file import read_metrics
from opsin.training.non_finite import NonFinite

import jobs
import runs
import zoo
from poison import ended

GUARD = "opsin.training.non_finite:NonFinite"
BAD = "zoo/5"
"""In step 2 of batches of 4; on two ranks it is rank 0's second sample."""
SMALL: dict[str, Any] = {"global_batch": 4, "steps": 3, "microbatch": 2}


def poisoned(what: str = "nan", policy: str = "stop", sample: str = BAD, **more: Any) -> dict[str, Any]:
    guard = {"policy": policy, **more}
    return {
        **SMALL,
        "algorithms": [("poison:Poison", {"sample": sample, "what": what})],
        "callbacks": [(GUARD, guard)],
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, NaN equal to nothing."""
    return a.keys() == b.keys() and len(a) > 20 and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_without_trouble_is_the_same_bit_for_bit() -> None:
    plain = ended(**SMALL)
    watched = ended(**SMALL, callbacks=[(GUARD, {})])
    assert plain["losses"] == watched["losses"] and same(plain["steps"][-1], watched["steps"][-1])


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
def test_stopped_in_the_step_before_its_update(what: str) -> None:
    good = ended(**{**SMALL, "steps": 1}, algorithms=[("poison:Poison", {"sample": "none"})])
    told = ended(**poisoned(what))
    assert same(told["steps"][-1], good["steps"][-1]) and len(told["steps"]) == 1
    uid = stable_hash(BAD)
    assert f"for sample '{BAD}' (uid {uid}, rank 0); stopped before the optimizer's update" in told["said"]
    assert told["said"].startswith("step 2: ") and "\n" not in told["said"]
    assert told["said"].endswith("no checkpoint was saved yet")
    if what == "gradient":
        assert "the gradients of " in told["said"] and " tensors, such as net.hf." in told["said"]
    else:
        assert "loss/train/poison is not finite" in told["said"] and "loss/train/lm" not in told["said"]


@pytest.mark.parametrize("what", ["nan", "gradient"])
def test_a_batch_is_left_out_without_a_trace(what: str, tmp_path: Path) -> None:
    file = tmp_path / "non_finite.jsonl"
    told = ended(**poisoned(what, "skip", log=str(file)))
    assert told["said"] is None and len(told["steps"]) == 3
    one, two, three = told["steps"]
    assert same(one, two) and not same(two, three)  # weights, momentum and its step counts
    assert math.isnan(told["losses"][1]["loss/train/poison"]) == (what == "nan")
    assert all(math.isfinite(v) for v in told["losses"][2].values())
    assert [s.get("non_finite/skipped") for s in told["logged"]] == [None, 1.0, None]
    (entry,) = map(json.loads, file.read_text().splitlines())
    key = "poison" if what == "nan" else "gradient"
    expected = {"id": BAD, "uid": stable_hash(BAD), "rank": 0, "losses": [key]}
    assert entry == {"step": 2, "losses": [key], "samples": [expected], "found": True}
    # The third step is that of a training that never saw the second batch.
    chosen = jobs.mixed_samples(12)
    never = ended(**{**poisoned(sample="none"), "steps": 2}, samples=[*chosen[:4], *chosen[8:]])
    assert same(never["steps"][1], three)


def test_methods_keep_no_trace_of_what_was_left_out() -> None:
    """L2T's own means are of numbers alone, and the second look is in none of them."""
    l2t = ("opsin.algorithms.l2t:L2T", {"template_source": "none", "lambda_instruction": 0.3})
    with_l2t = poisoned("nan", "skip")
    with_l2t["algorithms"] = [*with_l2t["algorithms"], l2t]
    plain = {**with_l2t, "callbacks": [], "algorithms": [("poison:Poison", {"sample": "none"}), l2t]}
    bad, good = ended(**with_l2t), ended(**plain)
    assert bad["logged"][1]["l2t/n_I"] == good["logged"][1]["l2t/n_I"] > 0
    assert bad["logged"][1]["l2t/loss_I"] == good["logged"][1]["l2t/loss_I"]


def test_too_many_stop() -> None:
    def always(**limits: int) -> str:
        guard = (GUARD, {"policy": "skip", **limits})
        return ended(**{**SMALL, "steps": 4}, algorithms=[("poison:Always", {})], callbacks=[guard])["said"]

    assert "3 batches were left out, more than max_skipped_batches=2" in always(max_skipped_batches=2)
    said = always(max_in_a_row=1)
    assert "2 batches in a row, more than 1" in said
    assert "for every one of its 4 samples, so look at settings before data: 'zoo/4'" in said


def test_a_run_whose_first_batch_was_left_out_resumes(tmp_path: Path) -> None:
    """The optimizer has no state yet when the first checkpoint is made."""
    options = poisoned("nan", "skip", "zoo/1")
    saved = {"save_folder": str(tmp_path), "save_interval": "1ba", "save_overwrite": True}
    whole = ended(**options, trainer=saved)
    again = ended(**options, trainer={"load_path": str(tmp_path / "ep0-ba1-rank0.pt")})
    assert whole["said"] is again["said"] is None and len(again["steps"]) == 2
    assert same(whole["steps"][-1], again["steps"][-1])
    # A skipped batch that a checkpoint knows of stays counted.
    assert again["logged"][0].get("non_finite/skipped") is None
    counted = torch.load(tmp_path / "ep0-ba3-rank0.pt", weights_only=False)["state"]["callbacks"]["NonFinite"]
    assert counted == {"skipped": 1, "in_a_row": 0}


def test_a_gradient_that_clipping_has_spread_is_named_as_many() -> None:
    """One norm for all makes every gradient NaN before anybody looks: then no single tensor is blamed."""
    spoil = ("poison:SpoilGradient", {})
    clip = ("composer.algorithms:GradientClipping", {"clipping_type": "norm", "clipping_threshold": 1.0})
    guard = {**SMALL, "callbacks": [(GUARD, {})]}
    alone = ended(**guard, algorithms=[spoil])["said"]
    assert "the gradient of net.hf.lm_head.weight is not finite (its losses are)" in alone
    spread = ended(**guard, algorithms=[spoil, clip])["said"]
    assert re.search(
        r"the gradients of \d\d tensors, such as net\.\S+, are not finite \(the losses are\)", spread
    )


def test_weights_that_went_wrong_are_named_and_never_skipped() -> None:
    options = {**SMALL, "callbacks": [(GUARD, {"policy": "skip"}), ("poison:BreakWeights", {"after": 1})]}
    said = ended(**options)["said"]
    assert said.startswith(
        "step 2: loss/train/lm is not finite because weights are not finite since the update before"
    )
    assert "no batch can be learnt from any more" in said


def test_a_picture_that_overflows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pictures through a real processor whose deviation is wrong: white / 1e-39 is infinite, black is 0."""
    stock = zoo.build

    def narrow(*args: Any, **kwargs: Any) -> Any:
        built = stock(*args, **kwargs)
        built.processor.image_processor.image_mean = [0.0] * 3
        built.processor.image_processor.image_std = [1e-39] * 3
        return built

    monkeypatch.setattr(zoo, "build", narrow)
    samples = [{**zoo.sample(i), "images": pack_images([flat(255 * (i == 6))])} for i in range(8)]
    said = ended(**{**SMALL, "steps": 2}, samples=samples, callbacks=[(GUARD, {})])["said"]
    assert said.startswith("step 2: loss/train/lm is not finite for sample 'zoo/6' (uid ")


def flat(shade: int) -> bytes:
    """A PNG of one shade of grey."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 20, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.world
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_all_ranks_do_the_same_when_one_has_the_sample(ranks: Any, parallel: str) -> None:
    for sample, rank in ((BAD, 0), ("zoo/7", 1)):
        stopped = ranks.run("poison:ended", parallel=parallel, **poisoned(sample=sample), timeout=180)
        assert stopped[0]["said"] == stopped[1]["said"] is not None
        assert f"step 2: loss/train/poison is not finite for sample '{sample}' (uid " in stopped[0]["said"]
        assert f"rank {rank}); stopped" in stopped[0]["said"] and len(stopped[0]["steps"]) == 1
    for what in ("nan", "gradient"):
        told = ranks.run("poison:ended", parallel=parallel, **poisoned(what, "skip", "zoo/7"), timeout=180)
        for one in told:
            assert one["said"] is None and one["fsdp"] == (parallel == "fsdp2")
            assert same(one["steps"][0], one["steps"][1]) and not same(one["steps"][1], one["steps"][2])
        assert same(told[0]["steps"][2], told[1]["steps"][2])


def test_a_stored_target_that_is_infinite_ends_a_run_which_goes_on_from_the_named_checkpoint(
    tmp_path: Path,
    scenes: str,
    own_cache: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Through ``opsin train``: exit code 2 and one line; the same command with ``non_finite=skip`` goes on."""
    data, bad = stored_with_infinity(tmp_path, scenes)
    config = infinite_run(tmp_path, data)

    def typed(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["opsin", "train", config, *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
            raise SystemExit(0)
        return int(left.value.code or 0), capsys.readouterr().err

    code, said = typed()
    line = said.splitlines()[-1]
    assert code == 2 and line.startswith(
        f"opsin: step 3: loss/train/ross is not finite for sample '{bad}' (uid "
    )
    checkpoint = Path(line.partition("last good checkpoint: ")[2].removesuffix(" (step 2)"))
    folder = tmp_path / "runs" / "small"
    assert checkpoint.is_file() and checkpoint.parent == folder / "checkpoints" / "instruct"
    saved = torch.load(checkpoint, weights_only=False)["state"]["model"]
    assert all(bool(v.isfinite().all()) for v in saved.values())
    assert [entry["step"] for entry in read_metrics(folder / "metrics.jsonl")] == [1, 2]
    # The named checkpoint is where the same command goes on; nothing is done again.
    code, said = typed("non_finite=skip")
    assert code == 0, said
    lines = read_metrics(folder / "metrics.jsonl")
    assert [entry["step"] for entry in lines] == [1, 2, 3, 4]
    assert lines[2]["non_finite/skipped"] == 1 and lines[2]["loss/train/ross"] is None
    assert lines[3]["loss/train/ross"] is not None
    notes = (folder / "stages" / "instruct" / "non_finite.jsonl").read_text().splitlines()
    assert [[s["id"] for s in json.loads(note)["samples"]] for note in notes] == [[bad], [bad]]


@pytest.mark.slow
@pytest.mark.world
def test_sharded_ranks_end_alike_and_go_on_from_the_named_checkpoint(
    tmp_path: Path, scenes: str, own_cache: None, ranks: Any
) -> None:
    data, bad = stored_with_infinity(tmp_path, scenes)
    config = infinite_run(tmp_path, data, parallelism_config={"fsdp2": {}}, device_train_microbatch_size=2)
    first, second = ranks.run("poison:run_ended", files=[config], timeout=240)
    assert first == second is not None
    assert first.startswith(f"step 3: loss/train/ross is not finite for sample '{bad}' (uid ")
    checkpoint = Path(first.partition("last good checkpoint: ")[2].removesuffix(" (step 2)"))
    assert checkpoint.is_dir() and (checkpoint / ".metadata").is_file() and checkpoint.name == "ep0-ba2"
    went_on = ranks.run("poison:run_ended", files=[config], arguments=["non_finite=skip"], timeout=240)
    assert went_on == [None, None]
    lines = read_metrics(tmp_path / "runs" / "small" / "metrics.jsonl")
    assert [entry["step"] for entry in lines] == [1, 2, 3, 4] and lines[2]["non_finite/skipped"] == 1


def test_a_packed_row_is_named_whole() -> None:
    said = ended(**poisoned(), packing=True)["said"]
    assert said.startswith("step 2: loss/train/poison is not finite for ") and f"'{BAD}' (uid " in said


def infinite_run(tmp_path: Path, data: str, **changes: Any) -> str:
    """A run over :func:`stored_with_infinity`."""
    ross = {"ross": {"target": {"name": "pixels", "cell": 4}, "width": 64, "draws": 1, "stored": "required"}}
    options: dict[str, Any] = {
        "algorithms": ross, "train_loader": {"dataset": {"remote": data, "shuffle": False}},
        "save_interval": "1ba", "max_duration": "4ba",
        "model": {k: v for k, v in runs.SMALL["model"].items() if k != "patch_size"},
    }  # fmt: skip
    return runs.config_file(tmp_path, data, **options, **changes)


def stored_with_infinity(tmp_path: Path, scenes: str) -> tuple[str, str]:
    """A copy of scenes with stored targets of which one is infinite: its address, and the id of that sample, of step 3."""
    latents.latents(
        scenes, str(tmp_path / "copy"), "scenes_llava", target="pixels", settings=["cell=4"], device="cpu"
    )
    bad = list(StreamingVLMDataset(remote=str(tmp_path / "copy"), batch_size=8, shuffle=False))[19]["id"]
    with MDSWriter(
        out=str(tmp_path / "bad"), columns={**COLUMNS, COLUMN: "bytes"}, hashes=list(HASHES)
    ) as writer:
        for sample in StreamingVLMDataset(remote=str(tmp_path / "copy"), batch_size=8, shuffle=False):
            row = {key: sample[key] for key in (*COLUMNS, COLUMN)}
            if row["id"] == bad:
                targets = unpack(row[COLUMN])
                targets[0].values[3, 0] = float("inf")
                row[COLUMN] = pack(targets, targets[0].values.shape[1])
            writer.write(row)
    said = json.loads((tmp_path / "copy" / DESCRIPTION).read_text())
    said["index"] = dataset_hash((tmp_path / "bad" / "index.json").read_bytes())
    (tmp_path / "bad" / DESCRIPTION).write_text(json.dumps(said))
    return str(tmp_path / "bad"), bad


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="non_finite 'skipp': unknown; did you mean 'skip'"):
        NonFinite("skipp")
    with pytest.raises(UserError, match="max_skipped_batches: -1 is negative"):
        NonFinite(max_skipped_batches=-1)
