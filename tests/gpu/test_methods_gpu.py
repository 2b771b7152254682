"""Each method alone and all together on the GPU: the CPU's numbers; where heads are; who waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.training.checkpoints import read

import restarts
import settings
from on_device import Look, Syncs, trained, worst

pytestmark = pytest.mark.gpu

SETS = [(), *((name,) for name in settings.METHODS), tuple(settings.METHODS)]
EACH = pytest.mark.parametrize("subset", SETS, ids=settings.name_of)


@EACH
def test_losses_and_gradients_are_the_cpus(device: str, subset: tuple[str, ...]) -> None:
    here, there = trained(subset, "cpu"), trained(subset, device)
    assert len(there["losses"]) == 3
    for step, (a, b) in enumerate(zip(there["losses"], here["losses"], strict=True)):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4), step
    for step, (a, b) in enumerate(zip(there["gradients"], here["gradients"], strict=True)):
        assert worst(a, b) < 1e-4, step


@EACH
def test_bf16_is_close_to_fp32(device: str, subset: tuple[str, ...]) -> None:
    exact, rounded = trained(subset, device), trained(subset, device, "amp_bf16")
    first, same = rounded["losses"][0], exact["losses"][0]
    for key, value in same.items():
        assert first[key] == pytest.approx(value, rel=0.02, abs=0.02), key
    a, b = (
        torch.cat([v.flatten().float() for _, v in sorted(r["gradients"][0].items())])
        for r in (rounded, exact)
    )
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.98
    assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.05)
    assert all(v.dtype == torch.float32 for v in rounded["gradients"][0].values())


def _looked(device: str, **options: Any) -> dict:
    trained.__wrapped__(  # type: ignore[attr-defined]
        tuple(settings.METHODS), device, steps=2, callbacks=[("on_device:Look", {})], **options
    )
    return Look.seen


def test_heads_are_on_the_device_and_in_the_optimizer_once(device: str) -> None:
    seen = _looked(device)
    heads = {n for n in seen["parameters"] if n.startswith("net.auxiliary.")}
    assert {n.split(".")[2] for n in heads} == {"ross", "jarvis"}
    assert set(seen["parameters"].values()) == {device}
    assert set(seen["times"].values()) == {1} and heads <= set(seen["times"])
    assert all(kinds == {device} for kinds in seen["state"].values()) and heads <= set(seen["state"])


def test_sharded_on_one_gpu_heads_too_and_what_it_saves_goes_on_whole(device: str, tmp_path: Path) -> None:
    """FSDP2 with nccl, a world of one; its checkpoint is resumed without."""
    options = {"save_folder": str(tmp_path / "sharded"), "save_interval": "1ba"}
    whole = trained(tuple(settings.METHODS), device)
    sharded = trained.__wrapped__(  # type: ignore[attr-defined]
        tuple(settings.METHODS), device, parallel="fsdp2", callbacks=[("on_device:Look", {})], trainer=options
    )
    assert sharded["fsdp"] and not sharded["plain_parameters"]
    assert {n for n in Look.seen["sharded"] if n.startswith("net.auxiliary.")}
    for a, b in zip(sharded["losses"], whole["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    torch.distributed.destroy_process_group()
    resumed = trained.__wrapped__(  # type: ignore[attr-defined]
        tuple(settings.METHODS), device, trainer={"load_path": str(tmp_path / "sharded" / "ep0-ba2")}
    )
    assert resumed["losses"][0] == pytest.approx(whole["losses"][2], rel=1e-4, abs=1e-5)


def test_no_step_waits_for_the_device_on_our_account(cuda: str) -> None:
    """The waits of Composer and transformers are listed in ``training/compat.py``."""
    found = {}
    for subset in SETS:
        trained.__wrapped__(subset, cuda, callbacks=[("on_device:Syncs", {})])  # type: ignore[attr-defined]
        found[subset] = list(Syncs.found)
    for subset, seen in found.items():
        print(f"\n{settings.name_of(subset)}: {len(seen)} waits")
        for place in sorted({f"  {who}: {line}" for who, line in seen}):
            print(place)
    assert sum(map(len, found.values())), "nothing was seen: is set_sync_debug_mode without effect?"
    ours = {line for seen in found.values() for who, line in seen if who == "ours"}
    assert not ours, "\n".join(sorted(ours))


def test_resuming_is_exact(device: str, tmp_path: Path) -> None:
    """Same numbers after a checkpoint as without one, all methods on; what is loaded, to the bit."""
    everything = tuple(settings.METHODS)
    saving = {"save_folder": str(tmp_path), "save_filename": "ba{batch}.pt", "save_interval": "1ba"}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = trained.__wrapped__(everything, device, trainer=saving)  # type: ignore[attr-defined]
        rest = trained.__wrapped__(  # type: ignore[attr-defined]
            everything,
            device,
            trainer={"load_path": str(tmp_path / "ba2.pt")},
            callbacks=[("on_device:Look", {})],
        )
    finally:
        torch.use_deterministic_algorithms(False)
    saved = read(tmp_path / "ba2.pt")["state"]["model"]
    assert saved and all(torch.equal(v, Look.loaded[n]) for n, v in saved.items())
    assert rest["losses"][0] == pytest.approx(whole["losses"][2], rel=1e-6, abs=1e-7)
    if device == "cpu":
        assert rest["losses"][0] == whole["losses"][2]
    assert worst(rest["weights"], whole["weights"]) < 1e-5


def test_a_whole_run_from_yaml_trains_resumes_and_exports(device: str, tmp_path: Path) -> None:
    """Streaming, all methods, bf16, callbacks, export; then on from its own checkpoint. And from the CPU's."""
    where = {"device": "gpu" if device == "cuda" else "cpu", "max_duration": "4ba"}
    exact = Path(restarts.run([restarts.config(tmp_path / _made(tmp_path, "a"), "exact", **where)]))
    cpu = Path(
        restarts.run([restarts.config(tmp_path / _made(tmp_path, "b"), "cpu", **{**where, "device": "cpu"})])
    )
    # (A run of ours does what Composer's default is: matrix products in TF32.)
    restarts.same(restarts.told(exact), restarts.told(cpu), 1e-2)
    half = Path(
        restarts.run(
            [restarts.config(tmp_path / _made(tmp_path, "c"), "half", precision="amp_bf16", **where)]
        )
    )
    restarts.same(restarts.told(half), restarts.told(cpu), 5e-2)
    restarts.cut_back(cpu, tmp_path / "d" / "runs" / "cpu", 2)
    moved = Path(restarts.run([restarts.config(tmp_path / "d", "cpu", **where)]))
    restarts.same(restarts.told(moved), restarts.told(cpu), 1e-2)
    assert (half / "model" / "model.safetensors").is_file()


def _made(folder: Path, name: str) -> str:
    (folder / name).mkdir()
    return name
