"""A real S3 server of the test's own (nanio: checks signatures, keeps each object as a file), ended by its pid."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lmcache_ext.tiers.s3 import S3
from tests.processes import send

USER, PASSWORD, BUCKET = "tester", "not/a+secret", "kv-cache"


class Server:
    """`start` it; an object of the bucket lies under `folder / BUCKET / its name`."""

    def __init__(self, folder: Path) -> None:
        for module in ("nanio", "obstore"):
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
        self.folder = folder
        (folder / BUCKET).mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Server:
        command = [sys.executable, "-m", "nanio", "serve", "--data-dir", str(self.folder), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--no-access-log", "--log-level", "error"]
        keys = {"NANIO_ACCESS_KEY": USER, "NANIO_SECRET_KEY": PASSWORD}
        self._process = subprocess.Popen(command, env={**os.environ, **keys})
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    return self
            assert time.monotonic() < deadline and self._process.poll() is None, "the S3 server did not start"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        assert self._process is not None
        send(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None

    def medium(self, prefix: str, bucket: str = BUCKET, password: str = PASSWORD, **options: float) -> S3:
        config = {"endpoint": self.endpoint, "region": "us-east-1", "virtual_hosted_style_request": False}
        config |= {"access_key_id": USER, "secret_access_key": password}
        return S3(bucket, prefix, config, **options)  # type: ignore[arg-type]


@functools.cache
def common() -> Server:
    """One server for all tests that do no harm to it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="lmcache-ext-s3-", dir=memory))
    server = Server(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    return server.start()


__all__ = ["BUCKET", "PASSWORD", "USER", "Server", "common", "signal"]
