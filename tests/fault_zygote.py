"""Where trials come from: a process that has imported everything once and forks a real job for each line it is given.

Run as a script. A line of standard input is the JSON of a job, answered by ``{"pid": N}``; when one ends,
``{"ended": N, "status": exit code}``. The job is an ordinary process of its own session, which ends as any Python program
does. It appends what happens to the file ``events``, a line each, so that a killed one has told what it did.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import select
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

BATCH, LOADER_TIMEOUT, STORE_SECONDS = 2, 20.0, 2
"""Samples a batch; Opsin's ``train_loader.timeout`` (300) and its waiting for a store's first answer (10, 20), scaled down."""


def digest(sample: dict[str, Any]) -> str:
    """Hash of what is stored."""
    text = json.dumps([sample["id"], sample["conversations"], sample["meta"]], sort_keys=True).encode()
    return hashlib.blake2b(text + sample["images"], digest_size=8).hexdigest()


def digests(samples: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A collator: id and digest of each sample."""
    return [(s["id"], digest(s)) for s in samples if not s.get("filler")]


class Encoded:
    """The real collator; what it left blank is told by its status."""

    def __init__(self) -> None:
        from opsin.data.collate import VLMCollator
        from opsin.data.loader import build_encoder

        import zoo

        built = zoo.build("llava")
        self.collator = VLMCollator(
            build_encoder(built.processor, built.hf.config, template="vicuna_v1", max_seq_len=400)
        )

    def __call__(self, samples: list[dict[str, Any]]) -> list[tuple[str, str]]:
        batch = self.collator(samples)
        return [
            (s["id"], "blank" if status else digest(s))
            for s, status in zip(samples, batch["sample_status"].tolist(), strict=True)
        ]


def open_dataset(job: dict[str, Any]) -> Any:
    """Opsin's dataset or the stock one, with the same arguments."""
    options = {
        "batch_size": BATCH, "shuffle": True, "shuffle_seed": 5, "shuffle_block_size": 16, "predownload": 2,
        "num_canonical_nodes": 1, **job["options"],
    }  # fmt: skip
    if job["cls"] != "stock":
        from opsin.data import object_store
        from opsin.data.streaming import StreamingVLMDataset

        object_store.CONNECT_SECONDS = object_store.READ_SECONDS = STORE_SECONDS
        place = {"remote": job["remote"], "local": job["local"]}
        if job["cls"] == "mixed":  # of one stream, so that an epoch is still each sample once
            mixture = {"phases": [{"start": f"{at}ba", "weights": {"all": 1}} for at in (0, 10, 60)]}
            return StreamingVLMDataset(streams={"all": place}, mixture=mixture, **options)
        return StreamingVLMDataset(**place, **options)
    from streaming import StreamingDataset
    from streaming.base.shared import prefix

    # Trials run side by side: each counts its shared memory from a number of its own.
    prefix._each_prefix_int = lambda: iter(range(job["number"], 10**6))
    return StreamingDataset(remote=job["remote"], local=job["local"], **options)


def open_loader(job: dict[str, Any], dataset: Any) -> Any:
    from torch.utils.data import DataLoader

    from opsin.data.loader import build_loader

    workers: dict[str, Any] = {"num_workers": job["workers"]}
    if job["workers"]:
        workers |= {"prefetch_factor": 1, "persistent_workers": job["persistent"]}
    collate = Encoded() if job["collate"] == "encoded" else digests
    if job["cls"] != "stock":
        return build_loader(collate, dataset, BATCH, timeout=LOADER_TIMEOUT, **workers)  # type: ignore[arg-type]
    return DataLoader(dataset, batch_size=BATCH, collate_fn=collate, **workers)


class Events:
    """What happens, for whoever watches; and the places where it waits for them."""

    def __init__(self, job: dict[str, Any]):
        self.job, self.file = job, Path(job["events"])

    def tell(self, **event: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def gate(self, name: str) -> None:
        """Wait to be let go on."""
        import multiprocessing

        time.sleep(0.4)  # until what is read ahead has come
        here = sum(1 for _ in Path(self.job["local"] or "/nowhere").glob("shard.*.mds"))
        self.tell(gate=name, workers=[p.pid for p in multiprocessing.active_children()], shards=here)
        if self.job["fill"] and name == "batch":
            fill(Path(self.job["fill"]))
        while not Path(f"{self.job['events']}.{name}").exists():
            time.sleep(0.02)


def fill(file: Path) -> None:
    """Leave no room on a disk."""
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as out:
        for size in (65536, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    out.write(bytes(size))


def run(job: dict[str, Any]) -> int:
    """All epochs of a job; the code it ends with."""
    events = Events(job)
    try:
        if job["together"]:
            events.gate("start")
        dataset = open_dataset(job)
        state = job["state"]
        if state is not None:
            dataset.load_state_dict(state)
        if job["cls"] != "stock":
            from opsin.data import shared_memory

            events.tell(token=shared_memory.job().token)
        loader = open_loader(job, dataset)
        for epoch in range(state["epoch"] if state else 0, job["epochs"]):
            done = state["sample_in_epoch"] if state and state["epoch"] == epoch else 0
            for batch in loader:
                done += len(batch)
                events.tell(epoch=epoch, batch=batch, state=dataset.state_dict(done, True))
                if [epoch, done] == job["gate"]:
                    events.gate("batch")
            # As Composer: its count of the epoch's samples is 0 when a finished epoch is saved.
            events.tell(epoch=epoch, ended=True, state=dataset.state_dict(0, True))
            if [epoch, -1] == job["gate"]:
                events.gate("batch")
        events.tell(finished=True)
        return 0
    except BaseException as error:
        events.tell(error=type(error).__name__, **said(error, job["cls"]))
        traceback.print_exc()
        return 1


def said(error: BaseException, cls: str) -> dict[str, Any]:
    """The line an error comes to: what ``opsin train`` says of it, or the last line of its text."""
    from opsin.data.loader import lost_worker
    from opsin.models.errors import one_line, user_error_in

    ours = user_error_in(error)
    if ours is None and cls != "stock":  # torch raises it wherever the main process is
        ours = lost_worker(error)
    if ours is not None:
        return {"line": one_line(ours), "ours": True}
    lines = str(error).strip().splitlines() or [""]
    return {"line": lines[-1], "ours": False}


def start(job: dict[str, Any]) -> int:
    """Become a job: a session of its own, its environment, its files."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    for name, value in job["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    import tempfile

    tempfile.tempdir = job["tmp"]
    if job["mount"]:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"none", job["mount"].encode(), b"tmpfs", 0, b"size=4m"):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), job["mount"])
    if job["fill"]:
        Path(job["fill"]).unlink(missing_ok=True)
    return run(job)


def serve() -> int:
    """Fork a job for each line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    living: set[int] = set()
    lines = os.fdopen(os.dup(0), "rb", buffering=0)
    answers.write(json.dumps({"ready": True}) + "\n")
    while True:
        if select.select([lines], [], [], 0.02)[0]:
            line = lines.readline()
            if not line:
                return 0
            pid = os.fork()
            if pid == 0:
                lines.close()
                answers.close()
                return start(json.loads(line))
            living.add(pid)
            answers.write(json.dumps({"pid": pid}) + "\n")
        for pid in list(living):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                living.discard(pid)
                answers.write(json.dumps({"ended": pid, "status": os.waitstatus_to_exitcode(status)}) + "\n")


def read_models_once() -> None:
    """Keep what every S3 client reads from botocore's files, 0.4 s of work each: no connection, no thread."""
    import pickle
    from functools import cache

    from boto3.session import Session
    from botocore.loaders import JSONFileLoader

    stock = JSONFileLoader.load_file
    pickled = cache(lambda path: pickle.dumps(stock(JSONFileLoader(), path)))
    JSONFileLoader.load_file = lambda self, path: pickle.loads(pickled(path))  # type: ignore[method-assign]
    Session().client("s3", region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")


if __name__ == "__main__":
    import s3transfer.manager  # noqa: F401
    import torch

    import zoo  # noqa: F401

    torch.set_num_threads(1)
    read_models_once()
    gc.collect()
    gc.freeze()  # or each job copies all that was imported when it ends, 2 s of work
    sys.exit(serve())
