"""The data of all fault trials, and the stores that have it; what no case harms is shared."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from opsin.data.schema import COLUMNS, HASHES

import zoo
from fault_stores import Bucket
from fault_trials import Lab
from fault_zygote import digest

SAMPLES = 96


def write(folder: Path) -> dict[str, str]:
    """The dataset of all trials: 96 samples in 16 shards; id -> digest."""
    from streaming import MDSWriter

    samples = [zoo.sample(i, images=1 + i % 2, turns=1 + i % 2) for i in range(SAMPLES)]
    with MDSWriter(out=str(folder), columns=COLUMNS, hashes=list(HASHES), size_limit=3000) as writer:
        for sample in samples:
            writer.write(sample)
    return {sample["id"]: digest(sample) for sample in samples}


class Stores:
    """Data and servers for cases; those that no case harms are shared by all trials."""

    def __init__(self, root: Path):
        self.root, self.good = root, root / "good"
        root.mkdir(parents=True, exist_ok=True)
        self.lab = Lab(root, write(self.good))
        self.shared = Bucket(root / "shared")
        self._open = contextlib.ExitStack()
        self._guarded: dict[str, str] | None = None
        self._lock = threading.Lock()

    def bucket(self) -> Bucket:
        """A store that may be killed, with the good data at ``s3://data/good``."""
        bucket = Bucket(self.root / f"bucket-{uuid.uuid4().hex[:8]}")
        shutil.copytree(self.good, bucket.root / "data" / "good")
        return bucket

    def place(self, name: str, harm: Callable[[Path], None] | None = None) -> str:
        """Data on the shared store, copied and harmed once."""
        folder = self.shared.root / "data" / name
        with self._lock:
            if not folder.exists():
                shutil.copytree(self.good, folder)
                if harm is not None:
                    harm(folder)
        return f"s3://data/{name}"

    def guarded(self) -> dict[str, str]:
        """Environment of a store that looks at credentials, with the data at ``s3://data/good``."""
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        import stores

        with self._lock:
            if self._guarded is None:
                folder = self.root / f"weed-{uuid.uuid4().hex[:8]}"
                folder.mkdir()
                found = self._open.enter_context(stores.seaweedfs(folder))
                client = boto3.client(
                    "s3", endpoint_url=found["S3_ENDPOINT_URL"], region_name="us-east-1",
                    aws_access_key_id=found["AWS_ACCESS_KEY_ID"],
                    aws_secret_access_key=found["AWS_SECRET_ACCESS_KEY"],
                )  # fmt: skip
                for attempt in range(20):  # it answers before all of it is there
                    try:
                        client.create_bucket(Bucket="data")
                        break
                    except (BotoCoreError, ClientError):
                        if attempt == 19:
                            raise
                        time.sleep(1)
                for file in self.good.iterdir():
                    client.upload_file(str(file), "data", f"good/{file.name}")
                self._guarded = found
        return self._guarded

    def close(self) -> None:
        self.lab.close()
        self.shared.kill()
        self._open.close()
