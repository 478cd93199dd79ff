"""A frontend and a worker as subprocesses on loopback, with file discovery and ports of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI

from lmcache_ext.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL_NAME = "e2e-model"
BLOCK = 32
START_S = 480.0
STOP_S = 60.0
WORKER_FLAGS = (
    *("--served-model-name", MODEL_NAME),
    *("--block-size", str(BLOCK)),
    *("--max-model-len", "2048"),
    *("--max-num-seqs", "8"),
    "--enforce-eager",
    # A tiny model would fill its answers with the white space that JSON allows.
    *("--structured-outputs-config", json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})),
)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Poll until ``condition`` is true; fail with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


def get(url: str, body: Any = None) -> tuple[int, str]:
    """GET, or POST a JSON body. Returns (status, text); status 0 when nobody listens."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


@dataclass
class Server:
    """A running pair of processes."""

    folder: Path
    http_port: int = field(default_factory=free_port)
    system_port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def system_url(self) -> str:
        return f"http://127.0.0.1:{self.system_port}"

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        """Sum of a metric's samples on the worker's system port; 0 if there are none."""
        _, text = get(f"{self.system_url}/metrics")
        lines = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def clear_gpu_cache(self) -> None:
        status, text = get(f"{self.system_url}/engine/control/clear_kv_blocks", {})
        assert status == 200 and json.loads(text)["status"] == "success", text

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def start(self, name: str, module: str, *argv: str, env: Mapping[str, str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, *argv],
                cwd=self.folder,
                env=dict(env),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def listed(self) -> bool:
        for name, process in self.processes.items():
            assert process.poll() is None, f"{name} ended with {process.returncode}:\n{self.log(name)[-4000:]}"
        return f'"{MODEL_NAME}"' in get(f"{self.url}/v1/models")[1]

    def signal(self, name: str, number: int = signal.SIGTERM) -> None:
        self.processes[name].send_signal(number)

    def stop(self) -> None:
        """End what is still running, worker first; stragglers of their sessions are killed."""
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)


def environment(folder: Path, server: Server, extra: Mapping[str, str]) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "LMCACHE_", "ENABLE_"))}
    return {
        **plain,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # One thread is plenty for these models, and does not wait for another on a busy machine.
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_SYSTEM_PORT": str(server.system_port),
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "0",
        **extra,
    }


@contextlib.contextmanager
def serving(
    folder: Path, model: Path, *, flags: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Run a frontend and a worker until the with block ends."""
    server = Server(folder)
    variables = environment(folder, server, env or {})
    frontend_variables = {name: value for name, value in variables.items() if name != "DYN_SYSTEM_PORT"}
    http = ("--http-host", "127.0.0.1", "--http-port", str(server.http_port))
    try:
        server.start("frontend", "dynamo_lmcache.frontend", *http, env=frontend_variables)
        server.start("worker", "dynamo_lmcache.vllm", "--model", str(model), *WORKER_FLAGS, *flags, env=variables)
        until(server.listed, START_S, "the model is listed")
        # Listed a moment before it answers.
        ready = {"model": MODEL_NAME, "prompt": "a", "max_tokens": 1}
        until(lambda: get(f"{server.url}/v1/completions", ready)[0] == 200, 20, "the first answer")
        yield server
    finally:
        server.stop()
