"""``opsin plan``: operations against PyTorch's counter, memory against real allocations, and what it refuses."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback
from torch.utils.flop_counter import FlopCounterMode

from opsin.models.errors import UserError
from opsin.training import cli
from opsin.training.config import load
from opsin.training.plan.hardware import GIB, GPUS, gpu_named, gpu_of_device
from opsin.training.plan.plan import Asked, Plan, make_plan

import jobs
import runs
import zoo

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


# --- operations


class Counted(Callback):
    """Logs the operations of the second step, as PyTorch counts them, and as the model says."""

    def __init__(self) -> None:
        self._counter: Any = None

    def batch_start(self, state: Any, logger: Any) -> None:
        if int(state.timestamp.batch) == 1:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def batch_end(self, state: Any, logger: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            counted, self._counter = float(self._counter.get_total_flops()), None
            logger.log_metrics({"counted": counted, "said": state.model.flops_per_batch(state.batch)})


def last_step(peak: float | None = 1e12, **options: Any) -> dict[str, float]:
    """What the second step of a small training logs. Attention is products of matrices, which PyTorch's counter sees."""
    monitor = {"window_size": 1, "gpu_flops_available": peak}
    callbacks = [(f"{__name__}:Counted", {}), ("opsin.training.speed:SpeedMonitor", monitor)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return jobs.train(callbacks=callbacks, steps=2, **options)["logged"][-1]


ROSS = ("opsin.algorithms.ross:ROSS", {"target": {"name": "pixels", "cell": 8}, "draws": 3, "width": 64})
JARVIS = (
    "opsin.algorithms.jarvis:JARVIS",
    {"target": {"name": "tower", "path": "scenes"}, "masks": "none", "ntp_probability": 0.0},
)


@pytest.mark.parametrize(
    ("language_model", "algorithms"),
    [(True, []), (False, []), (True, [ROSS]), (True, [JARVIS])],
    ids=["all", "projector", "ross", "jarvis"],
)
def test_operations_are_those_that_pytorch_counts(language_model: bool, algorithms: list[Any]) -> None:
    """A real step of a real Trainer; every sample has a picture and the same length, so that nothing is padded."""
    logged = last_step(
        samples=[zoo.sample(7, images=1, turns=1) | {"id": f"same/{i}"} for i in range(8)],
        global_batch=4,
        size=32,
        algorithms=algorithms,
        trainable={"language_model": language_model, "mm_projector": True, "vision_tower": False},
        pad_to_multiple_of=1,
    )
    assert logged["said"] == pytest.approx(logged["counted"], rel=0.02)
    assert 0 < logged["said"] / logged["throughput/flops_per_sec"] < 60  # seconds
    assert logged["throughput/device/mfu"] == pytest.approx(logged["throughput/flops_per_sec"] / 1e12)


def test_padding_is_no_work() -> None:
    """Rows of many lengths: what is counted follows the tokens, not the shape of the batch."""
    logged = last_step(peak=None, pad_to_multiple_of=64)
    assert 0 < logged["said"] < logged["counted"]
    assert "throughput/device/flops_per_sec" in logged
    assert "throughput/device/mfu" not in logged  # a CPU has no peak that anybody knows


# --- memory


@pytest.fixture(scope="module")
def measured() -> Any:
    """``benchmarks/plan_memory.py`` as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("plan_memory", BENCHMARKS / "plan_memory.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["plan_memory"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param({}, id="plain"),
        pytest.param({"checkpointing": True}, id="checkpointing"),
        pytest.param({"rows": 8, "micro": 2}, id="micro-batches"),
        pytest.param({"language_model": False}, id="projector"),
        pytest.param({"ross": True}, id="ross", marks=pytest.mark.slow),
    ],
)
def test_memory_is_what_a_real_step_allocates(measured: Any, cell: dict[str, Any]) -> None:
    found, predicted = measured.measure(measured.Cell("toy", **cell), "cpu")
    assert predicted.total == pytest.approx(found, rel=0.05)


# --- plans


def planned(*arguments: str, gpus: int = 8, gpu: str = "h100", **asked: Any) -> Plan:
    files = ["recipes/llava-1.5-7b.yaml", "recipes/scale/8xh100.yaml"]
    return make_plan(load(files, arguments), Asked(gpus, gpu_named(gpu), **asked))


@pytest.fixture(scope="module")
def plan() -> Plan:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = planned()
    assert torch.equal(torch.get_rng_state(), before)  # planning draws nothing
    return made


def test_a_plan_of_llava(plan: Plan) -> None:
    align, instruct = plan.stages
    assert instruct.parts["language_model"] == {"trainable": 6_738_939_904, "frozen": 0}
    assert align.parts["language_model"] == {"trainable": 0, "frozen": 6_738_939_904}
    assert (instruct.grid, instruct.visual_tokens) == ((24, 24), 576)
    # By hand: forward 2 operations a weight and token, backward 4, attention 12 a layer, pair and channel.
    tokens = 250 + 0.94 * 576
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    by_hand = 6 * weights * tokens + 12 * 32 * 4096 * tokens**2
    assert instruct.operations_a_sample["language_model"] == pytest.approx(by_hand, rel=1e-6)
    assert instruct.operations_a_sample["lm_head"] == pytest.approx(6 * 150 * 32064 * 4096, rel=1e-6)
    tower = 0.94 * (24 * (2 * 577 * 12 * 1024**2 + 4 * 577**2 * 1024) + 2 * 576 * 588 * 1024)
    assert instruct.operations_a_sample["vision_tower"] == pytest.approx(tower, rel=0.01)
    assert align.operations_a_sample["language_model"] < instruct.operations_a_sample["language_model"]
    assert instruct.steps == -(-665298 // 128)
    assert instruct.seconds_a_step == pytest.approx(instruct.operations_a_step / (8 * 989.5e12 * 0.4))
    assert instruct.gpu_hours == pytest.approx(8 * instruct.hours)
    assert instruct.tokens_a_second == pytest.approx(instruct.samples_a_second * tokens)


def test_memory_of_llava_by_way(plan: Plan) -> None:
    found = plan.stages[1].memory
    assert set(found) == {"DDP", "DDP with checkpointing", "FSDP2", "FSDP2 with checkpointing"}
    assert plan.stages[1].chosen == "FSDP2 with checkpointing" and plan.stages[1].fits
    ddp, sharded = found["DDP with checkpointing"], found["FSDP2 with checkpointing"]
    trained, whole = 6_738_939_904 + 20_979_712, 6_738_939_904 + 20_979_712 + 303_507_456
    assert ddp["weights"] == 4 * whole and ddp["gradients"] == 4 * trained and ddp["optimizer"] == 8 * trained
    assert ddp["buckets"] == 4 * trained and sharded["buckets"] == 0
    assert sharded["weights"] == 4 * whole / 8 and sharded["optimizer"] == trained
    assert found["DDP"]["activations"] > 2 * ddp["activations"]
    assert ddp["total"] > 80 * GIB > sharded["needs"]


def test_a_plan_is_plain_data_and_says_what_it_assumes(plan: Plan) -> None:
    from opsin.training.plan.report import assumptions

    assert json.loads(json.dumps(plan.as_dict()))["stages"][1]["name"] == "instruct"
    said = " ".join(assumptions(plan))
    assert "665,298 samples" in said and "no data is read" in said


def test_methods_have_their_share() -> None:
    files = ["recipes/qwen2-7b-siglip.yaml", "recipes/methods/ross.yaml", "recipes/scale/1x24gb.yaml"]
    align, instruct = make_plan(load(files), Asked(1, GPUS["h200"])).stages
    work = instruct.operations_a_sample
    # The paper's denoiser and auto-encoder: a head of 64 M parameters for 4 draws, .79 TFLOP a picture of 432 pixels.
    assert 0.01 < work["ross/head"] / sum(work.values()) < 0.06
    assert work["ross/target"] / 0.94 == pytest.approx(0.79e12, rel=0.1)
    assert instruct.parts["auxiliary"]["trainable"] == 63_884_352 and instruct.teachers["ross"] > 80e6
    assert instruct.memory[instruct.chosen]["teachers"] == 4 * instruct.teachers["ross"]
    assert align.latents_a_sample["ross"] == 729 * 128 * 2


@pytest.mark.slow
def test_stored_targets_are_read_and_not_computed() -> None:
    files = ["recipes/llava-1.5-7b.yaml", "recipes/methods/jarvis.yaml", "recipes/scale/1x24gb.yaml"]
    stored, computed = (
        make_plan(load(files), Asked(1, GPUS["h200"], stored=stored)).stages[0] for stored in (True, False)
    )
    assert (
        "jarvis/target" in computed.operations_a_sample and "jarvis/target" not in stored.operations_a_sample
    )
    assert stored.memory[stored.chosen]["teachers"] == 0 < computed.memory[computed.chosen]["teachers"]
    assert stored.read_a_second_a_node > computed.read_a_second_a_node
    assert computed.latents["jarvis"] == pytest.approx(
        658e9, rel=0.01
    )  # the sheet's size of 558,000 pictures' features


def test_a_stage_that_does_not_fit_says_what_would() -> None:
    small = planned("parallelism_config=null", "activation_checkpointing=false")
    assert [stage.fits for stage in small.stages] == [False, False]
    with pytest.raises(UserError, match=r"stage align: needs \d+ GiB a GPU .DDP., h100 has 80") as refused:
        small.refuse_misfits()
    assert "activation_checkpointing: true; parallelism_config: {fsdp2: {}}" in str(refused.value)
    assert small.stages[1].remedies == ["parallelism_config: {fsdp2: {}} with activation_checkpointing: true"]


@pytest.mark.slow
def test_a_smaller_micro_batch_is_found_where_nothing_else_helps() -> None:
    many = planned("stages.instruct.device_train_microbatch_size=64", gpus=1, gpu="h200")
    assert many.stages[1].remedies == ["device_train_microbatch_size: 4"]
    fewer = planned("stages.instruct.device_train_microbatch_size=4", gpus=1, gpu="h200")
    assert fewer.stages[1].fits


def test_what_a_plan_refuses(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"global_train_batch_size: 256 cannot be dealt to 24 GPUs.*--gpus 16"
    ):
        planned(gpus=24)
    with pytest.raises(UserError, match=r"plan\.instruct\.sample: unknown key; did you mean 'samples'"):
        planned("plan.instruct.sample=3")
    with pytest.raises(UserError, match=r"plan\.instruct\.samples: expected a number, 0 or more, got 'many'"):
        planned("plan.instruct.samples=many")
    with pytest.raises(UserError, match=r"plan\.instruction: no stage 'instruction'"):
        planned("plan.instruction.samples=3")
    with pytest.raises(UserError, match="--mfu 40: a share"):
        planned(mfu=40.0)
    with pytest.raises(UserError, match="--gpu h1000: not in the table; did you mean 'h100'"):
        gpu_named("h1000")


def test_the_plan_of_a_small_run_of_ones_own(tmp_path: Path) -> None:
    config = runs.config_file(tmp_path, "nowhere", max_duration="2ep")
    stage = make_plan(load([config]), Asked(1, GPUS["l4"])).stages[0]
    assert stage.fits and stage.steps == 0 and stage.hours == 0  # how large its data are is not known
    assert set(stage.memory) == {"one GPU", "one GPU with checkpointing"}
    known = make_plan(load([config], ["plan.instruct.samples=64"]), Asked(1, GPUS["l4"])).stages[0]
    assert known.steps == 16


def test_drivers_names_of_gpus() -> None:
    for said, name in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ):
        found = gpu_of_device(said)
        assert found is not None and found.name == name, said
    for other in ("Tesla K80", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA A10G", "NVIDIA H100 NVL"):
        assert gpu_of_device(other) is None, other
    assert gpu_named("H100").peak("amp_bf16") == 989.5e12 and gpu_named("a100").peak("fp32") == 19.5e12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h10"], "--gpu h10: not in the table"),
        (["--gpus", "3"], "cannot be dealt to 3 GPUs"),
        pytest.param(["--gpus", "1", "--gpu", "l4", "--json"], "stage align: needs", marks=pytest.mark.slow),
    ],
    ids=["gpu", "batch", "memory"],
)
def test_as_it_is_typed(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "_debug", False)
    monkeypatch.setattr("sys.argv", ["opsin", "plan", "recipes/llava-1.5-7b.yaml", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    out, err = capsys.readouterr()
    assert left.value.code == 2 and said in err and len(err.splitlines()) == 1
    if "--json" in words:  # what is asked for is printed all the same
        plan = json.loads(out)
        assert plan["stages"][0]["fits"] is False and "nothing that this plan knows of" in err


def test_the_tables_say_it_all(plan: Plan) -> None:
    from rich.console import Console

    from opsin.training.plan.report import show

    said = io.StringIO()
    show(plan, Console(file=said, width=170))
    for words in (
        "lmsys/vicuna-7b-v1.5: configuration from yamls/models/vicuna-7b-v1.5.yaml", "6,738,939,904",
        "FSDP2 with checkpointing *", "PFLOP a step", "GPU-hours", "MB a second and node",
    ):  # fmt: skip
        assert words in said.getvalue(), words
