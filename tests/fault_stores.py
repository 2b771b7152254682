"""Stores that fail on demand: an S3 server that can be killed, and a proxy that drips, stalls or damages what it carries."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Bucket:
    """A localbucket server over a folder, whose subfolders are its buckets; always on the same port."""

    def __init__(self, root: Path):
        self.root, self.port = root, free_port()
        (root / "data").mkdir(parents=True, exist_ok=True)
        self.server: subprocess.Popen | None = None
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "S3_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def start(self) -> None:
        """Start it, again too; returns when it answers."""
        command = [sys.executable, "-m", "localbucket", str(self.root), "--port", str(self.port)]
        self.server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 5).close()
                return
            time.sleep(0.05)
        raise RuntimeError("the store does not start")

    def kill(self) -> None:
        """SIGKILL."""
        if self.server is not None:
            self.server.kill()
            self.server.wait(10)
            self.server = None


class Proxy:
    """Between a client and a store.

    Args:
        port: of the store.
        mode: ``pass``; ``silent``: takes what comes and never answers; ``drip``: a little at a time; ``stall``: stops in
            the middle of each shard; ``damage``: changes one byte of the first shard that has a picture. It can be
            changed while it runs.
    """

    def __init__(self, port: int, mode: str = "pass"):
        self.store, self.mode, self.damaged = port, mode, False
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.mode = "closed"
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while self.mode == "silent":
                time.sleep(0.1)
            with socket.create_connection(("127.0.0.1", self.store), 10) as store:
                asked: list[bytes] = [b""]
                up = threading.Thread(target=self._up, args=(client, store, asked), daemon=True)
                up.start()
                while data := store.recv(65536):
                    self._down(client, data, asked[0])

    def _up(self, client: socket.socket, store: socket.socket, asked: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if data.startswith((b"GET ", b"HEAD ")):
                    asked[0] = data.split(b"\r\n", 1)[0]
                store.sendall(data)
        with contextlib.suppress(OSError):
            store.shutdown(socket.SHUT_RDWR)

    def _down(self, client: socket.socket, data: bytes, asked: bytes) -> None:
        shard = asked.startswith(b"GET ") and b"/shard." in asked
        if self.mode == "stall" and shard:
            client.sendall(data[:-50] if len(data) > 1000 else data)  # the header, or a part of the body
            while self.mode == "stall" and len(data) > 1000:
                time.sleep(0.1)
        elif self.mode == "drip" and shard:
            for at in range(0, len(data), 512):
                client.sendall(data[at : at + 512])
                time.sleep(0.01)
        else:
            if self.mode == "damage" and shard and not self.damaged and b"IEND" in data:
                self.damaged = True
                data = data.replace(b"IEND", b"IENd", 1)
            client.sendall(data)
