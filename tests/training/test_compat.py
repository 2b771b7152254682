"""Traps of the libraries below, each sprung on purpose; and a word when upstream has mended one."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer import Trainer
from torch.distributed.checkpoint.metadata import Metadata
from torch.utils.data import DataLoader

from opsin.data.batch import vlm_data_spec
from opsin.data.loader import build_loader
from opsin.models.errors import UserError, user_error_in
from opsin.models.vlm import VisionLanguageModel
from opsin.training import compat
from opsin.training.config import load
from opsin.training.guards import EveryParameterTrained
from opsin.training.metrics_file import read_metrics
from opsin.training.train import train

import jobs
import runs
import zoo


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def _safe_again() -> Iterator[None]:
    yield
    compat.apply()


# Gradients over CPU ranks


@pytest.mark.world
def test_gloo_still_sums_where_fsdp2_asks_for_a_mean(ranks) -> None:
    """Fails when upstream has mended it: then ``compat.average_gradients_on_gloo`` can go."""
    expected = 4.0 if compat.Version("2.8") > compat.TORCH else 2.0
    got = ranks.run("jobs:gloo_reduce_scatter_average")
    assert got == [expected] * 2, (
        f"torch {compat.TORCH}: gloo's reduce_scatter of ReduceOp.AVG over 1 and 3 gives {got}, not {expected}: "
        "change or remove training.compat.average_gradients_on_gloo"
    )


@pytest.mark.world
def test_gradients_under_fsdp2_are_those_of_ddp_and_of_one_process(ranks) -> None:
    options = {"samples": jobs.mixed_samples(8), "global_batch": 4, "steps": 2, "microbatch": 1}
    one = jobs.train(**options)
    ddp, fsdp = (ranks.run("jobs:train", parallel=p, **options)[0] for p in ("ddp", "fsdp2"))
    assert fsdp["fsdp"] and not ddp["fsdp"]
    assert set(one["gradients"][0]) == set(ddp["gradients"][0]) == set(fsdp["gradients"][0])
    for name, gradient in ddp["gradients"][0].items():
        # AdamW would hide a factor of two, so the gradients themselves are compared.
        assert torch.allclose(fsdp["gradients"][0][name], gradient, atol=1e-6, rtol=1e-4), name
        assert torch.allclose(one["gradients"][0][name], gradient, atol=1e-6, rtol=1e-4), name
    assert max(float(g.abs().max()) for g in ddp["gradients"][0].values()) > 1e-3


@pytest.mark.world
def test_the_key_fsdp2_shards_saves_and_resumes(ranks, tmp_path: Path, scenes: str) -> None:
    """Composer takes ``{fsdp2: {}}`` as a dict and trains as DDP without a word; our key makes its object."""
    plain = train(runs.loaded(tmp_path, scenes, "run_name=plain", max_duration="4ba"))
    config = runs.config_file(
        tmp_path, scenes, run_name="sharded", parallelism_config={"fsdp2": {}}, max_duration="4ba",
        save_interval="2ba", device_train_microbatch_size=2,
    )  # fmt: skip
    results = ranks.run("jobs:run_yaml", files=[config])
    assert [r["sharded"] for r in results] == [[(True, [])]] * 2
    folder = Path(results[0]["folder"])
    whole = runs.losses(folder)
    assert whole == pytest.approx(runs.losses(plain.path), abs=1e-4)
    # From the sharded checkpoint of the second batch, the rest has the same losses.
    (halfway,) = (folder / "checkpoints" / "instruct").glob("*-ba2")
    resumed = ranks.run(
        "jobs:run_yaml", files=[config], arguments=["run_name=resumed", f"load_path={halfway}"]
    )
    assert runs.losses(Path(resumed[0]["folder"])) == pytest.approx(whole[2:], abs=1e-6)


# Checkpoints that run code


def _checkpoint_with(content: Any, tmp_path: Path, scenes: str) -> tuple[str, Path]:
    """A real run's checkpoint in which one value was exchanged."""
    folder = train(runs.loaded(tmp_path, scenes, max_duration="1ba"))
    (path,) = [p for p in folder.checkpoints("instruct").glob("*.pt") if not p.is_symlink()]
    whole = torch.load(path, weights_only=False)
    whole["state"]["run_name"] = content
    torch.save(whole, path)
    return str(path), tmp_path / "made"


def test_a_checkpoint_that_would_run_code_is_refused_in_one_line(tmp_path: Path, scenes: str) -> None:
    made = tmp_path / "made"
    path, _ = _checkpoint_with(Malicious(made), tmp_path, scenes)
    with pytest.raises(UserError, match=r"holds more than tensors and plain data.*trust_checkpoint") as error:
        train(runs.loaded(tmp_path, scenes, f"load_path={path}", "run_name=victim", max_duration="2ba"))
    assert "\n" not in str(error.value) and "mkdir" in str(error.value)
    assert not made.exists()
    # The file is live: whoever trusts it runs it.
    compat.apply(trust_checkpoints=True)
    from composer.utils import checkpoint

    checkpoint._torch_load_with_validation(path, "cpu")
    assert made.is_dir()


def test_a_checkpoint_that_is_not_there_is_one_line(tmp_path: Path, scenes: str) -> None:
    with pytest.raises(UserError, match=r"load_path: no checkpoint at 'nowhere\.pt'"):
        train(runs.loaded(tmp_path, scenes, "load_path=nowhere.pt"))


def test_a_distributed_checkpoints_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    compat.apply()
    made = tmp_path / "made"
    state = {"weight": torch.arange(3.0), "step": 7}
    dcp.save(state, checkpoint_id=tmp_path / "good", no_dist=True)
    loaded = {"weight": torch.zeros(3), "step": 0}
    dcp.load(loaded, checkpoint_id=tmp_path / "good", no_dist=True)
    assert loaded["step"] == 7 and torch.equal(loaded["weight"], state["weight"])
    evil = tmp_path / "good" / ".metadata"
    real: Metadata = pickle.loads(evil.read_bytes())
    real.planner_data = Malicious(made)
    evil.write_bytes(pickle.dumps(real))
    with pytest.raises(UserError, match=r"metadata names posix\.mkdir, which is no plain data") as error:
        dcp.FileSystemReader(tmp_path / "good").read_metadata()
    assert "\n" not in str(error.value) and not made.exists()
    compat.apply(trust_checkpoints=True)
    dcp.FileSystemReader(tmp_path / "good").read_metadata()
    assert made.is_dir()


@pytest.mark.parametrize(
    "name", ["os.system", "FileSystemReader", "Metadata.__init__", "_StorageInfo.__class__"]
)
def test_metadata_cannot_reach_other_names_through_an_allowed_module(name: str) -> None:
    compat.apply()
    from torch.distributed.checkpoint import filesystem

    parts = [b"torch.distributed.checkpoint.filesystem", name.encode()]
    # PROTO 4, two SHORT_BINUNICODE, STACK_GLOBAL, EMPTY_TUPLE, REDUCE, STOP
    payload = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(p)]) + p for p in parts) + b"\x93)R."
    with pytest.raises(UserError, match="which is no plain data"):
        filesystem.pickle.load(io.BytesIO(payload))


def test_objects_inside_a_distributed_checkpoint_cannot_run_code_either(tmp_path: Path) -> None:
    compat.apply()
    made = tmp_path / "made"
    dcp.save({"rng": Malicious(made)}, checkpoint_id=tmp_path / "evil", no_dist=True)
    with pytest.raises(BaseException, match="holds more than tensors and plain data") as error:
        dcp.load({"rng": None}, checkpoint_id=tmp_path / "evil", no_dist=True)
    assert user_error_in(error.value) is not None
    assert not made.exists()
    compat.apply(trust_checkpoints=True)
    dcp.load({"rng": None}, checkpoint_id=tmp_path / "evil", no_dist=True)
    assert made.is_dir()


def test_patches_may_be_applied_again_and_taken_back() -> None:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    compat.apply(trust_checkpoints=True)
    stock = DefaultLoadPlanner.load_bytes
    for _ in range(3):
        compat.apply()
    assert DefaultLoadPlanner.load_bytes is not stock
    compat.apply(trust_checkpoints=True)
    assert DefaultLoadPlanner.load_bytes is stock


# Composer's own traps


def _trainer(spec: Any, model: VisionLanguageModel, **options: Any) -> Trainer:
    return Trainer(
        model=model, train_dataloader=spec, max_duration="1ba", device="cpu", progress_bar=False,
        optimizers=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), **options,
    )  # fmt: skip


def _loader(built: zoo.Built, batch: int = 4) -> DataLoader:
    return DataLoader(
        jobs.Samples(jobs.mixed_samples(batch), batch, 0, 1), batch, collate_fn=jobs.collator(built)
    )


def test_composers_own_split_of_a_batch_is_refused_before_it_loses_pictures() -> None:
    built = zoo.build("llava")
    model = VisionLanguageModel(built.hf, built.processor)
    with pytest.raises(UserError, match=r"no label index: give the Trainer data\.batch\.vlm_data_spec"):
        _trainer(_loader(built), model, device_train_microbatch_size=4).fit()


def test_a_head_without_a_gradient_stops_the_run_before_its_checkpoint_cannot_be_resumed() -> None:
    built = zoo.build("llava")
    model = VisionLanguageModel(built.hf, built.processor)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or "projector" in name)
    model.net.auxiliary["idle"] = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"2 trainable tensors got no gradient.*net\.auxiliary\.idle\.weight"):
        _trainer(
            vlm_data_spec(_loader(built)), model,
            device_train_microbatch_size=2, callbacks=[EveryParameterTrained()],
        ).fit()  # fmt: skip


def test_a_loader_without_one_batch_is_refused_where_composer_would_loop_for_ever() -> None:
    with pytest.raises(UserError, match="3 samples a rank make no batch of 4"):
        build_loader(None, [0, 1, 2], 4, num_workers=0, drop_last=True)  # type: ignore[arg-type]
    assert len(build_loader(list, [0, 1, 2], 4, num_workers=0)) == 1  # type: ignore[arg-type]


def test_a_run_that_ended_between_its_last_checkpoint_and_its_model_goes_on_from_there(
    tmp_path: Path, scenes: str
) -> None:
    """``autoresume`` of a finished Trainer raises in Composer."""
    first = train(runs.loaded(tmp_path, scenes, max_duration="4ba"))
    before, steps = runs.losses(first.path), len(read_metrics(first.metrics))
    (first.stage("instruct") / "done.json").unlink()
    weights = (first.stage("instruct") / "model" / "model.safetensors").read_bytes()
    (first.stage("instruct") / "model" / "model.safetensors").unlink()
    again = train(load([str(first.config)]))
    assert runs.losses(again.path) == before and len(read_metrics(again.metrics)) == steps
    assert (again.stage("instruct") / "model" / "model.safetensors").read_bytes() == weights


def test_replaced_modules_stay_frozen_where_composer_would_raise_or_train_them() -> None:
    """The stock function first, so that this fails when upstream has mended it."""
    from composer.utils import module_surgery

    def surgery() -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
        net = torch.nn.Sequential(
            torch.nn.LayerNorm(2).requires_grad_(False), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2)
        )
        groups = [{"params": list(net[i].parameters())} for i in (1, 2)]
        return net, torch.optim.AdamW(groups)

    def replace(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        policies: Any = {torch.nn.LayerNorm: lambda child, index: torch.nn.LayerNorm(2)}
        module_surgery.replace_module_classes(net, policies, optimizers=optimizer)

    ours = module_surgery.update_params_in_optimizer
    module_surgery.update_params_in_optimizer = ours._stock  # type: ignore[attr-defined]
    try:
        with pytest.raises(RuntimeError, match="are not in the optimizer"):
            replace(*surgery())
    finally:
        module_surgery.update_params_in_optimizer = ours
    net, optimizer = surgery()
    replace(net, optimizer)
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True, True, True]
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in net.parameters() if p.requires_grad}
