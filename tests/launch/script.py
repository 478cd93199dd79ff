"""A launch script, run for real until it says that it serves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lmcache_ext.ports import free_port
from tests.launch.processes import heed_sigint, running_with

ROOT = Path(__file__).resolve().parents[2]
START_S = 600  # alone a worker takes 40 to 100 s; vLLM compiles, and a busy machine compiles slowly
STOP_S = 120


@dataclass
class Script:
    """A running script: what it printed, and the ports that it was given."""

    process: subprocess.Popen[str]
    folder: Path
    http_port: int
    system_port: int

    @property
    def output(self) -> str:
        return (self.folder / "script.log").read_text()

    @property
    def marker(self) -> str:
        """In the environment of all its processes."""
        return f"TEST_MARKER={self.folder}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def promise(self) -> tuple[str, int, str]:
        """(the curl line it printed, cached tokens of the second answer, the right text)."""
        command = re.search(r"^curl .*", self.output, re.MULTILINE)
        promised = re.search(r'cached_tokens should be (\d+), and the text of both "(\w+)"', self.output)
        assert command and promised, self.output
        return command[0], int(promised[1]), promised[2]

    def curl(self, command: str) -> dict[str, Any]:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
        return dict(json.loads(done.stdout))

    def metric(self, worker: int, name: str) -> float:
        """A metric's sum over its labels, from the system port of a worker; 0 if it has none of it."""
        url = f"http://127.0.0.1:{self.system_port + worker}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{re.escape(name)}(\{{| )", line))

    def processes(self) -> list[psutil.Process]:
        found = []
        for line in running_with(self.marker):
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(int(line.split()[0])))
        return found

    def cpu_share(self, seconds: float) -> float:
        """Cores that its processes kept busy over that time."""
        processes = self.processes()

        def spent() -> float:
            total = 0.0
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    total += times.user + times.system
            return total

        before = spent()
        time.sleep(seconds)
        return (spent() - before) / seconds

    def listeners(self) -> set[str]:
        """Addresses other than loopback on which its processes listen."""
        addresses = set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                for each in process.net_connections("tcp"):
                    if each.status == psutil.CONN_LISTEN and each.laddr.ip not in ("127.0.0.1", "::1"):
                        addresses.add(f"{process.name()} {each.laddr.ip}:{each.laddr.port}")
        return addresses

    def interrupt(self) -> None:
        """Ctrl-C: it ends, and nothing of it is left."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(STOP_S) == 130
        assert not running_with(self.marker)


@contextlib.contextmanager
def serving(folder: Path, name: str, *flags: str, **env: str) -> Iterator[Script]:
    """Run launch/`name` on the demo model until the with block ends."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("LMCACHE_", "DYN_", "VLLM_", "HF_", "MODEL"))}
    http, system = free_port(), free_port()
    variables = {
        **keep, "VENV": sys.prefix, "SKIP_SETUP": "1", "DEVICE": "cpu", "LOG_DIR": str(folder), "HTTP_PORT": str(http),
        "DYN_SYSTEM_PORT": str(system), "TEST_MARKER": str(folder), **env,
    }  # fmt: skip
    with (folder / "script.log").open("w") as output:
        process = subprocess.Popen(
            [ROOT / "launch" / name, *flags], env=variables, cwd=ROOT / "backends", stdout=output,
            stderr=subprocess.STDOUT, preexec_fn=heed_sigint,
        )  # fmt: skip
    script = Script(process, folder, http, system)
    try:
        deadline = time.monotonic() + START_S
        while "Ctrl-C stops it" not in script.output:
            assert process.poll() is None, script.output
            assert time.monotonic() < deadline, script.output
            time.sleep(0.5)
        yield script
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_S)
