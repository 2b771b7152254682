"""Jobs of several nodes: the environment of a process, the scripts that start it, and two hosts of which one is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from opsin.models.errors import UserError
from opsin.training.launch import complete_environment

import runs

TESTS = Path(__file__).resolve().parents[1]
CLUSTER = TESTS.parent / "yamls" / "cluster"
WHOLE = {
    "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "NODE_RANK": "1",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


def completed(**changes: str | None) -> dict[str, str]:
    environment = {k: v for k, v in {**WHOLE, **changes}.items() if v is not None}
    complete_environment(environment)
    return environment


def test_what_composer_sets_is_left_as_it_is() -> None:
    assert completed() == WHOLE


def test_torchruns_group_is_the_node() -> None:
    assert completed(NODE_RANK=None, GROUP_RANK="1") == {**WHOLE, "GROUP_RANK": "1"}


def test_a_missing_node_follows_from_the_rank() -> None:
    assert completed(NODE_RANK=None)["NODE_RANK"] == "1"


def test_a_process_that_nothing_launched_is_left_alone() -> None:
    for alone in ({}, {"WORLD_SIZE": "1"}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}):
        environment = dict(alone)
        complete_environment(environment)
        assert environment == alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE is not set"),
        ({"RANK": "16"}, "RANK=16 is none of WORLD_SIZE=16"),
        ({"RANK": "-1"}, "RANK=-1: expected a whole number"),
        ({"LOCAL_RANK": "8"}, "LOCAL_RANK=8 is none of LOCAL_WORLD_SIZE=8"),
        ({"LOCAL_WORLD_SIZE": "32"}, "more than WORLD_SIZE=16"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2 is none of 2 nodes"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="environment: ") as refused:
        completed(**changes)
    assert said in str(refused.value)


def test_tasks_of_slurm_that_know_nothing_of_each_other_are_refused() -> None:
    with pytest.raises(UserError, match=r"srun started 16 tasks.*slurm\.sh"):
        complete_environment({"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "3"})


# --- scripts


def command(folder: Path, name: str, body: str) -> None:
    """A program that stands in for one of the cluster's."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture()
def programs(tmp_path: Path) -> Path:
    """Launchers that write down how they were called, and Slurm's two commands, which start everything here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for launcher in ("composer", "torchrun"):
        command(folder, launcher, f'echo "{launcher} $* | ${{NODE_RANK-unset}}" >> {tmp_path}/calls')
    command(folder, "scontrol", 'echo "$3" | tr , "\\n"')
    command(folder, "srun", 'shift; for i in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$i "$@"; done')
    return folder


def called(script: list[str], programs: Path, **environment: str) -> list[str]:
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(script, env={**os.environ, "PATH": path, **environment}, check=True)
    return (programs.parent / "calls").read_text().splitlines()


COMPOSER = (
    "composer --nproc 8 --world_size 16 --node_rank {node} --master_addr gpu-a --master_port {port} --module_mode "
    "opsin.training.cli train a.yaml key=a value | unset"
)


def test_slurms_script_starts_the_launcher_on_every_node(programs: Path) -> None:
    calls = called(
        ["bash", str(CLUSTER / "slurm.sh"), "a.yaml", "key=a value"],
        programs,
        SLURM_JOB_ID="20007",
        SLURM_JOB_NODELIST="gpu-a,gpu-b",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="8",
        OPSIN_CLUSTER=str(CLUSTER),
    )
    assert calls == [COMPOSER.format(node=n, port=20007) for n in range(2)]


def test_skypilots_task_starts_the_launcher_on_its_node(programs: Path) -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 8 and task["resources"]["accelerators"] == "H100:8"
    environment = {
        **task["envs"], "CONFIG": "a.yaml b.yaml", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "gpu-a\ngpu-b",
    }  # fmt: skip
    script = f"cd {CLUSTER.parents[1]}\n{task['run']}".replace("PATH=$PWD/.venv/bin:$PATH ", "")
    calls = called(["bash", "-c", script], programs, **environment)
    said = COMPOSER.format(node=1, port=29500).replace(
        "a.yaml key=a value", "a.yaml b.yaml variables.data=s3://my-bucket run_root=/runs"
    )
    assert calls == [said]


def test_a_nodes_script_names_what_is_missing_and_knows_torchrun(programs: Path) -> None:
    node = ["bash", str(CLUSTER / "node.sh"), "a.yaml"]
    known = {
        "NNODES": "2",
        "NODE_RANK": "1",
        "NPROC_PER_NODE": "4",
        "MASTER_ADDR": "gpu-a",
        "MASTER_PORT": "29500",
    }
    calls = called(node, programs, **known, LAUNCHER="torchrun")
    assert calls == [
        "torchrun --nnodes 2 --nproc-per-node 4 --node-rank 1 --master-addr gpu-a --master-port 29500 -m "
        "opsin.training.cli train a.yaml | unset"
    ]
    for name in known:
        environment = {k: v for k, v in {**os.environ, **known}.items() if k != name}
        refused = subprocess.run(node, env=environment, capture_output=True, text=True)
        assert refused.returncode and name in refused.stderr


def test_nodes_wait_for_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer gives every node the name that rank 0 draws; when it no longer does, the patch can go."""
    from composer.utils import dist

    from opsin.training import compat

    def broadcast(names: list[str], src: int = 0) -> None:
        names[0] = "._signal_file_node0_aB3dE6"

    compat.wait_for_files_of_ones_own_node()
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert dist.get_node_signal_file_name() == "._signal_file_node1_aB3dE6"
    assert dist.get_node_signal_file_name._stock() == "._signal_file_node0_aB3dE6"  # type: ignore[attr-defined]


# --- two hosts


def has_hosts() -> bool:
    """Whether network namespaces can be made here, and joined."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    inside = "mount -t tmpfs none /run && ip netns add a && ip link add bridge0 type bridge && ip link add cable0 type veth peer name eth0 netns a"
    return not subprocess.run(["unshare", "-rmn", "sh", "-c", inside], capture_output=True).returncode


def on_two_hosts(folder: Path, jobs: list[dict[str, Any]], timeout: float = 280) -> dict[str, dict[str, Any]]:
    """Do jobs on two hosts (``tests/hosts.py``), one after the other."""
    for job in jobs:
        job.setdefault("port", random.SystemRandom().randrange(20000, 40000))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    driver = [
        "unshare",
        "-rmn",
        sys.executable,
        str(TESTS / "hosts.py"),
        str(folder),
        str(folder / "jobs.json"),
    ]
    done = subprocess.run(
        driver, capture_output=True, text=True, timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    logs = "".join(f"\n--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    results = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    for result in results.values():
        result["logs"] = logs
    return results


def a_run(folder: Path, name: str, **changes: Any) -> list[str]:
    """Arguments of ``opsin train`` for a small run that reads its data from the bridge's store."""
    path = runs.config_file(
        folder, "s3://bucket/scenes", f"{name}.yaml", run_name=name, max_duration="8ba", save_interval="2ba",
        dist_timeout=30.0, device="cpu", **changes,
    )  # fmt: skip
    return [path]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    runs.write_scenes(folder / "store" / "bucket" / "scenes", samples=40)
    return folder


pytestmark_hosts = pytest.mark.skipif(
    not has_hosts(), reason="network namespaces cannot be made here (unshare -rmn, ip)"
)


@pytestmark_hosts
def test_a_run_on_two_hosts_survives_the_loss_of_one(stored: Path) -> None:
    metrics = stored / "runs" / "lost" / "metrics.jsonl"
    results = on_two_hosts(
        stored,
        [
            {"name": "whole", "train": a_run(stored, "whole")},
            {"name": "lost", "train": a_run(stored, "lost"), "kill": 1, "after": 5, "metrics": str(metrics)},
            {"name": "again", "train": a_run(stored, "lost")},
        ],
    )
    assert results["whole"]["codes"] == [0, 0], results["whole"]["logs"]
    survivor, killed = results["lost"]["codes"]
    assert killed == -9 and survivor not in (0, None), results["lost"]["logs"]
    assert results["again"]["codes"] == [0, 0], results["again"]["logs"]
    expected = runs.losses(stored / "runs" / "whole")
    assert len(expected) == 8 and runs.losses(stored / "runs" / "lost") == expected
    # Each host has read its own part of the data into a cache of its own.
    for number in range(2):
        assert list((stored / f"cache-{number}").rglob("shard.*"))


@pytest.mark.slow
@pytestmark_hosts
@pytest.mark.parametrize("launcher", ["composer", "torchrun"])
def test_launchers_start_a_run_on_two_hosts(stored: Path, launcher: str) -> None:
    """As a scheduler starts them: ``node.sh`` on each host, with nothing but the five variables of a node."""
    bin_ = str(Path(sys.executable).parent)
    path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
    job = {
        "name": launcher,
        "command": [
            "bash",
            str(CLUSTER / "node.sh"),
            *a_run(stored, launcher, parallelism_config={"fsdp2": {}}),
        ],
        "environment": {"LAUNCHER": launcher, "PATH": path},
    }
    result = on_two_hosts(stored, [job])[launcher]
    assert result["codes"] == [0, 0], result["logs"]
    assert len(runs.losses(stored / "runs" / launcher)) == 8
