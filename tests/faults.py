"""The fault table's cases: what is wrong, when it happens, and what may become of it.

Each is run on real servers by ``tests/data/test_faults.py`` (some settings) and ``benchmarks/faults.py`` (all).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_data import Stores
from fault_stores import Proxy, free_port
from fault_trials import CLEAR, RECOVERED, Job, Outcome, Setting, judge

BAD = "shard.00009.mds"
"""The shard that is corrupt, truncated or missing: neither the first nor the last."""


Trials = Iterator[Outcome]


@dataclass
class Case:
    """A fault.

    Args:
        name: as the table has it.
        trial: makes both runs on one cache, one after the other: (stores, setting, folder, case) -> two outcomes.
        first, second: outcomes of Opsin's first and second run that are right.
        clear: pattern that a clear error has, beside the name of a shard or an address.
        options: arguments of both datasets; ``stock``: of the stock one beside them.
        least: fewest workers for which it means something.
    """

    name: str
    trial: Callable[[Stores, Setting, Path, Case], Trials]
    first: tuple[str, ...] = (CLEAR,)
    second: tuple[str, ...] = (CLEAR,)
    clear: str = "."
    options: dict[str, Any] = field(default_factory=dict)
    stock: dict[str, Any] = field(default_factory=dict)
    least: int = 0
    more: dict[str, Any] = field(default_factory=dict)

    def arguments(self, setting: Setting) -> dict[str, Any]:
        common = {"download_retry": 2, "download_timeout": 2.0, **self.options}
        return (
            common
            if setting.cls != "stock"
            else {**common, "validate_hash": "xxh64", **self.options, **self.stock}
        )


def run_case(stores: Stores, case: Case, setting: Setting) -> list[Outcome]:
    """The first and the second run of a case on one cache."""
    folder = stores.root / f"trial-{uuid.uuid4().hex[:8]}"
    outcomes = list(case.trial(stores, setting, folder, case))
    shutil.rmtree(folder, ignore_errors=True)
    return outcomes


def finish(stores: Stores, case: Case, *jobs: Job, **options: Any) -> Outcome:
    """Wait for the last of some jobs, and judge them together."""
    jobs[-1].wait()
    outcome = judge(stores.lab, list(jobs), case.clear, **options)
    for job in jobs:
        stores.lab.forget(job)
    return outcome


# --- what is wrong with the data, all the time


def standing(harm: Callable[[Path], None] | None, address: str | None = None, blank: int = 0) -> Any:
    """A trial of data that is as wrong in the second run as in the first."""

    def trial(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
        remote = address or stores.place(case.name.replace(" ", "-").replace(",", ""), harm)
        for _ in range(2):
            job = stores.lab.job(
                setting, folder, remote, options=case.arguments(setting), env=stores.shared.environment, **case.more
            )  # fmt: skip
            yield finish(stores, case, job, blank=blank)

    return trial


def corrupt(folder: Path) -> None:
    """One byte of a picture, so that the sample can still be read."""
    data = (folder / BAD).read_bytes()
    (folder / BAD).write_bytes(data.replace(b"IEND", b"IENd", 1))


def truncate(folder: Path) -> None:
    os.truncate(folder / BAD, (folder / BAD).stat().st_size // 2)


def break_index(folder: Path) -> None:
    os.truncate(folder / "index.json", (folder / "index.json").stat().st_size // 2)


def unreadable(folder: Path) -> None:
    """A picture that is none, written as it should be: only who decodes it can know."""
    import hashlib

    import xxhash

    file, index = folder / BAD, json.loads((folder / "index.json").read_text())
    data = file.read_bytes().replace(b"\x89PNG", b"?PNG", 1)
    file.write_bytes(data)
    for shard in index["shards"]:
        if shard["raw_data"]["basename"] == BAD:
            shard["raw_data"]["hashes"] = {
                "sha1": hashlib.sha1(data).hexdigest(), "xxh64": xxhash.xxh64(data).hexdigest()
            }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))


# --- what is wrong with the store


def credentials(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
    wrong = {**stores.guarded(), "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    for _ in range(2):
        options = case.arguments(setting)
        yield finish(
            stores, case, stores.lab.job(setting, folder, "s3://data/good", options=options, env=wrong)
        )


def down(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
    """Nobody listens; then the store is there."""
    environment = {**stores.shared.environment, "S3_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}
    remote = stores.place("good")
    for env in (environment, stores.shared.environment):
        options = case.arguments(setting)
        yield finish(stores, case, stores.lab.job(setting, folder, remote, options=options, env=env))


def through(mode: str, later: str = "", second: str = "") -> Any:
    """A trial through a proxy in some mode, after the gate in another one, in the second run in a third."""

    def trial(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
        proxy = Proxy(stores.shared.port, mode)
        env = {**stores.shared.environment, "S3_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
        with contextlib.closing(proxy):
            for run in range(2):
                gate = [0, 12] if later and not run else None
                if run and second:
                    proxy.mode = second
                options = case.arguments(setting)
                job = stores.lab.job(
                    setting, folder, stores.place("good"), options=options, env=env, gate=gate
                )
                if gate and job.at_gate("batch"):
                    proxy.mode = later
                    job.go_on("batch")
                yield finish(stores, case, job)

    return trial


def killed_store(back: float | None) -> Any:
    """The store is killed in mid-epoch, and back after some seconds, or in the second run."""

    def trial(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
        bucket = stores.bucket()
        try:
            for run in range(2):
                if bucket.server is None:
                    bucket.start()
                options, gate = case.arguments(setting), [0, 12] if not run else None
                job = stores.lab.job(
                    setting, folder, "s3://data/good", options=options, env=bucket.environment, gate=gate
                )
                if gate and job.at_gate("batch"):
                    bucket.kill()
                    job.go_on("batch")
                    if back is not None:
                        time.sleep(back)
                        bucket.start()
                yield finish(stores, case, job)
        finally:
            bucket.kill()

    return trial


# --- what happens to the machine


def full_disk(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
    """Something else fills the cache's disk in mid-epoch; in the second run there is room again."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    for run in range(2):
        job = stores.lab.job(
            setting, folder, stores.place("good"), options=case.arguments(setting), env=stores.shared.environment,
            mount=None if run else str(disk), local=str(disk / "cache"), fill=str(disk / "other"),
            gate=None if run else [0, 12],
        )  # fmt: skip
        if not run and job.at_gate("batch"):
            job.go_on("batch")
        yield finish(stores, case, job)


def killed_worker(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
    for run in range(2):
        options, gate = case.arguments(setting), None if run else [0, 12]
        env = stores.shared.environment
        job = stores.lab.job(setting, folder, stores.place("good"), options=options, env=env, gate=gate)
        found = job.at_gate("batch") if gate else None
        if found:
            job.go_on("batch")
            for pid in found["workers"][:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        yield finish(stores, case, job)


OTHER = {0: 2, 1: 4, 2: 0, 4: 1}
"""Workers of the run that goes on, by those of the run that was killed."""


def killed_job(epoch: int, done: int) -> Any:
    """The whole process group is killed; a run with other workers goes on. Both count as one."""

    def trial(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
        options, env, remote = case.arguments(setting), stores.shared.environment, stores.place("good")
        job = stores.lab.job(setting, folder, remote, options=options, env=env, gate=[epoch, done])
        job.at_gate("batch")
        job.kill()
        job.wait()
        states = [event["state"] for event in job.events() if "state" in event]
        other = Setting(
            setting.cls, OTHER[setting.workers], setting.persistent and OTHER[setting.workers] > 0
        )
        resumed = stores.lab.job(
            other, folder, remote, options=options, env=env, state=states[-1] if states else None
        )
        yield finish(stores, case, job, resumed, lost=1)
        yield finish(stores, case, stores.lab.job(setting, folder, remote, options=options, env=env))

    return trial


def two_jobs(stores: Stores, setting: Setting, folder: Path, case: Case) -> Trials:
    """Two that start in one instant on one remote; Opsin's with the cache it takes by itself, stock's each with its own."""
    for _ in range(2):
        jobs, number = [], None
        for which in "ab":
            local = None if setting.cls != "stock" else str(folder / which)
            env = {**stores.shared.environment, "OPSIN_CACHE": str(folder / "opsin")}
            more = {} if number is None else {"number": number, "tmp": jobs[0].spec["tmp"]}
            jobs.append(
                stores.lab.job(
                    setting, folder, stores.place("good"), options=case.arguments(setting), env=env, local=local,
                    together=True, **more,
                )
            )  # fmt: skip
            number = jobs[0].spec["number"]
        for job in jobs:
            job.at_gate("start")
        for job in jobs:
            job.go_on("start")
        both = [finish(stores, case, job) for job in jobs]
        yield next((one for one in both if one.kind != RECOVERED), both[0])


CASES = [
    Case("nothing wrong", standing(None), (RECOVERED,), (RECOVERED,)),
    Case("corrupt shard", standing(corrupt), clear="hash|checksum|damaged"),
    Case(
        "corrupt shard, default arguments", standing(corrupt), clear="hash|checksum|damaged", stock={"validate_hash": None}
    ),
    Case("truncated shard", standing(truncate), clear="hash|checksum|bytes"),
    Case("missing shard", standing(lambda folder: (folder / BAD).unlink()), clear="not found|no such object"),
    Case("wrong hash name", standing(None), clear="validate_hash|hash algorithm", options={"validate_hash": "md5"}),
    Case("broken index", standing(break_index), clear="index"),
    Case("wrong credentials", credentials, clear="secret|credentials|denied|signature"),
    Case("missing bucket", standing(None, "s3://nobody/data"), clear="no bucket|NoSuchBucket"),
    Case("endpoint down at start", down, (CLEAR,), (RECOVERED,), "connect"),
    Case("endpoint that never answers", through("silent"), clear="does not answer|timeout|timed out"),
    Case("store killed, back within retries", killed_store(1.0), (RECOVERED,), (RECOVERED,), options={"download_retry": 5}),
    Case("store killed, back after retries", killed_store(None), (CLEAR,), (RECOVERED,), "connect"),
    Case("slow endpoint", through("drip"), (RECOVERED,), (RECOVERED,)),
    Case(
        "endpoint stalls in mid-shard", through("pass", "stall", "pass"), (CLEAR,), (RECOVERED,),
        "timed? ?out|timeout|does not answer|retries exceeded", {"download_timeout": 1.0},
    ),
    Case("shard damaged once on its way", through("damage"), (RECOVERED,), (RECOVERED,), "hash|checksum"),
    Case("full disk", full_disk, (CLEAR,), (RECOVERED,), "no space left"),
    Case("unreadable image", standing(unreadable, blank=1), (RECOVERED,), (RECOVERED,), more={"collate": "encoded"}),
    Case("worker killed", killed_worker, (CLEAR,), (RECOVERED,), "worker.*(killed|exited)", least=1),
    Case("job killed at its first batch", killed_job(0, 2), (RECOVERED,), (RECOVERED,)),
    Case("job killed in mid-epoch", killed_job(0, 42), (RECOVERED,), (RECOVERED,)),
    Case("job killed between epochs", killed_job(0, -1), (RECOVERED,), (RECOVERED,)),
    Case("job killed in its second epoch", killed_job(1, 30), (RECOVERED,), (RECOVERED,)),
    Case("two jobs at once", two_jobs, (RECOVERED,), (RECOVERED,)),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
