"""Doctor's look at the machine: GPU, memory, /dev/shm, locked memory."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmcache_ext.cli.finding import Finding, fail, ok, warn
from lmcache_ext.cli.model import weight_bytes
from lmcache_ext.cli.settings import OFF, read_config
from lmcache_ext.config import GIB, memory_available
from lmcache_ext.config.memory import DEFAULT_POOL_GB
from lmcache_ext.errors import ConfigError

# Resident size of the worker's three processes and the frontend, without weights and KV. On the CPU platform measured
# at 3.2 GiB; with CUDA, an allowance.
PROCESSES_GIB = {"cpu": 3.5, "cuda": 6.0}
# vLLM refuses to start with less: its ring for messages between processes is 10 chunks of 16 MiB.
SHM_MIB = 160
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def gpus() -> list[str]:
    """One line a GPU: name, memory, driver. Empty where nvidia-smi is missing or does not work."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return []
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def check_gpu(env: Mapping[str, str]) -> Iterator[Finding]:
    """One line a GPU; none is fine, vLLM has a CPU platform."""
    found = gpus()
    if not found:
        yield ok("gpu", "none: vLLM's CPU platform serves, for small models")
    for line in found:
        yield ok("gpu", line)


def kv_space_gib(env: Mapping[str, str], device: str) -> float:
    """GiB of host memory for vLLM's own KV cache: VLLM_CPU_KVCACHE_SPACE, on the CPU platform only."""
    if device != "cpu":
        return 0.0
    try:
        return float(env.get("VLLM_CPU_KVCACHE_SPACE") or 4)
    except ValueError:
        return 4.0


def check_memory(env: Mapping[str, str], available: int | None = None) -> Iterator[Finding]:
    """Host memory, as the cgroup sees it, against what the processes, the weights, vLLM's KV and our pool take."""
    left = (memory_available() if available is None else available) / GIB
    device = "cuda" if gpus() else "cpu"
    fixed = {
        "processes": PROCESSES_GIB[device],
        "weights": weight_bytes(env) / GIB if device == "cpu" else 0.0,
        "vLLM's KV (VLLM_CPU_KVCACHE_SPACE)": kv_space_gib(env, device),
    }
    fixed["pool (LMCACHE_MAX_LOCAL_CPU_SIZE)"] = _pool_gib(env, left)
    need = sum(fixed.values())
    text = f"{left:.1f} GiB free, {need:.1f} GiB needed: " + ", ".join(f"{k} {v:.1f}" for k, v in fixed.items() if v)
    if need <= left:
        yield ok("memory", text)
    else:
        yield fail("memory", text, "lower one of them, stop something else, or give the container more memory")


def _pool_gib(env: Mapping[str, str], left: float) -> float:
    """The host pool that this environment asks for; unset, it takes what fits."""
    if env.get("ENABLE_LMCACHE", "").strip().lower() in OFF:
        return 0.0
    try:
        asked = read_config(env)[0].max_local_cpu_size
    except ConfigError:
        return 0.0  # check_settings reports it
    return min(DEFAULT_POOL_GB, left / 4) if asked is None else asked


def check_shm(env: Mapping[str, str], path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """/dev/shm: vLLM's processes talk through it. Our pool does not live there."""
    advice = "docker run --shm-size=1g, or: mount -o remount,size=1g /dev/shm"
    if not os.access(path, os.W_OK):
        yield fail("shm", f"{path} is missing or can't be written", advice)
        return
    free_mib = shutil.disk_usage(path).free >> 20
    text = f"{free_mib} MiB free in {path}"
    if free_mib >= SHM_MIB:
        yield ok("shm", text)
    elif gpus():
        yield warn("shm", f"{text}; tensor parallelism needs {SHM_MIB} MiB", advice)
    else:
        yield fail("shm", f"{text}; vLLM needs {SHM_MIB} MiB", advice)


def check_compiler(env: Mapping[str, str]) -> Iterator[Finding]:
    """torch.compile (CPU) and Triton (GPU) build code while vLLM starts, against Python's headers."""
    compiler = shutil.which(env.get("CXX") or "g++", path=env.get("PATH"))
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None:
        yield fail("compiler", f"no {env.get('CXX') or 'g++'}: vLLM compiles while it starts", "apt-get install g++")
    elif not header.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        yield fail("compiler", f"no {header}: vLLM compiles while it starts", f"apt-get install libpython{version}-dev")
    else:
        yield ok("compiler", compiler)


def check_memlock(env: Mapping[str, str]) -> Iterator[Finding]:
    """The limit on locked memory: CUDA pins past it, RDMA does not."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    rdma = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    if soft == resource.RLIM_INFINITY:
        yield ok("memlock", "unlimited")
    elif rdma:
        advice = "ulimit -l unlimited, or docker run --ulimit memlock=-1"
        yield warn("memlock", f"{soft >> 20} MiB: NIXL can't register more than that with this machine's RDMA", advice)
    else:
        yield ok("memlock", f"{soft >> 20} MiB, and no RDMA device that would need more")
