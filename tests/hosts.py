"""Two hosts on this machine: network namespaces joined by a bridge, each with shared memory and a cache of its own.

Run as a script inside ``unshare -rmn``, where everything it makes is gone when it ends. It serves a folder as an S3 bucket
from the bridge's address and does the jobs of a JSON file one after the other, printing a JSON line for each. A job runs
one command (or, forked from this process, ``opsin train``) on both hosts; ``kill`` says which of them is lost, and after
how many logged steps.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STORE, HOSTS = "10.77.0.1", ("10.77.0.10", "10.77.0.11")
PORT = 9000
_libc = ctypes.CDLL(None, use_errno=True)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def build() -> None:
    """The bridge with the store's address, and a host at the end of a cable for each address of ``HOSTS``."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge0", "type", "bridge")
    ip("addr", "add", f"{STORE}/24", "dev", "bridge0")
    ip("link", "set", "bridge0", "up")
    for number, address in enumerate(HOSTS):
        host = f"host{number}"
        ip("netns", "add", host)
        ip("link", "add", f"cable{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
        ip("link", "set", f"cable{number}", "master", "bridge0", "up")
        ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
        ip("-n", host, "link", "set", "eth0", "up")
        ip("-n", host, "link", "set", "lo", "up")


def serve(root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "localbucket", str(root), "--host", STORE, "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            socket.create_connection((STORE, PORT), 5).close()
            return server
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the store does not start")


def enter(number: int) -> None:
    """Make the calling process one of a host: its network, and shared memory that no other host sees."""
    with Path(f"/run/netns/host{number}").open() as namespace:
        _checked(_libc.setns(namespace.fileno(), 0x40000000))
    _checked(_libc.unshare(0x00020000))
    _checked(_libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, None))


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def environment(number: int, job: dict[str, Any], folder: Path) -> dict[str, str]:
    """What both hosts share, and this one's own cache and number; as a cluster's scheduler gives it to a node."""
    return {
        "NNODES": "2", "NODE_RANK": str(number), "NPROC_PER_NODE": "1", "MASTER_ADDR": HOSTS[0],
        "MASTER_PORT": str(job["port"]), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
        "S3_ENDPOINT_URL": f"http://{STORE}:{PORT}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "OPSIN_CACHE": str(folder / f"cache-{number}"), **job.get("environment", {}),
    }  # fmt: skip


def start(number: int, job: dict[str, Any], folder: Path) -> int:
    """One host's process, the leader of a session: its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        log = os.open(folder / f"{job['name']}-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        enter(number)
        os.environ.update(environment(number, job, folder))
        if "command" in job:
            os.execvp(job["command"][0], job["command"])
        from opsin.training import cli

        # What a launcher makes of a node's environment, for one process a node.
        os.environ.update(RANK=str(number), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        sys.argv = ["opsin", "train", *job["train"]]
        try:
            cli.main()
            status = 0
        except SystemExit as left:
            status = int(left.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A job on both hosts; exit codes (negative: by a signal), and how long the survivor took to notice a loss."""
    began = time.monotonic()
    processes = [start(number, job, folder) for number in range(2)]
    codes: dict[int, int] = {}
    lost = None
    try:
        while len(codes) < 2 and time.monotonic() - began < job.get("limit", 200):
            for number, process in enumerate(processes):
                if number not in codes:
                    done, status = os.waitpid(process, os.WNOHANG)
                    if done:
                        codes[number] = os.waitstatus_to_exitcode(status)
            if "kill" in job and lost is None and _lines(Path(job["metrics"])) >= job["after"]:
                os.killpg(processes[job["kill"]], signal.SIGKILL)
                lost = time.monotonic()
            time.sleep(0.02)
    finally:
        for number, process in enumerate(processes):
            if number not in codes:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
    ended = time.monotonic()
    return {
        "name": job["name"], "codes": [codes.get(number) for number in range(2)],
        "noticed": None if lost is None else ended - lost, "seconds": ended - began,
    }  # fmt: skip


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def main() -> None:
    folder, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    build()
    server = serve(folder / "store")
    if any("train" in job for job in jobs):  # once, here: forked hosts have it
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import opsin.training.train  # noqa: F401
    try:
        for job in jobs:
            print(json.dumps(run(job, folder)), flush=True)
    finally:
        server.kill()
        server.wait(10)


if __name__ == "__main__":
    main()
