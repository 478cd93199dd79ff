"""One rank of a tensor-parallel engine is killed while it loads: the engine soon ends with an error and leaves nothing.
Needs two GPUs."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
if torch.cuda.device_count() < 2:
    pytest.skip("no two CUDA GPUs here", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))
from systems import LLAMA_8B, System  # noqa: E402 - a benchmark's helper

END_SECONDS = 90
PROMPTS = [[seed, 8192] for seed in range(6)]


def below(pid: int) -> dict[int, str]:
    """All descendants of a process: pid → name."""
    parents = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                name, rest = (entry / "stat").read_text().split("(", 1)[1].rsplit(") ", 1)
                parents[int(entry.name)] = (int(rest.split()[1]), name)
        except OSError:
            continue  # it ended meanwhile
    found: dict[int, str] = {}
    queue = [pid]
    while queue:
        parent = queue.pop()
        for child, (its_parent, name) in parents.items():
            if its_parent == parent and child not in found:
                found[child] = name
                queue.append(child)
    return found


def segments() -> set[str]:
    """Shared memory of ours by name, held open by anybody."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if "lmcache_ext" in target:
            found.add(target)
    return found


@pytest.mark.parametrize("delay", [0.005, 0.03, 0.1])
def test_a_killed_rank(tmp_path: Path, delay: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": 8}))
    llm = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 4 << 30,
           "max_num_batched_tokens": 8192, "enforce_eager": True}  # fmt: skip
    system = System("ours", tmp_path, {"llm": llm, "pool_gb": 4}, tmp_path)
    try:
        system.hear()
        pid = system._process.pid
        workers = sorted(child for child, name in below(pid).items() if "Worker" in name)
        assert len(workers) == 2, below(pid)
        everybody = set(below(pid))
        system.ask("generate", prompts=PROMPTS)
        time.sleep(0.5)
        system.ask("forget")
        heard: list[Any] = []

        def ask() -> None:
            try:
                heard.append(system.ask("generate", prompts=PROMPTS, tokens=64))
            except RuntimeError as error:
                heard.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(delay)
        os.kill(workers[1], signal.SIGKILL)
        asking.join(END_SECONDS)
        assert not asking.is_alive(), "the engine hangs"
        assert isinstance(heard[0], RuntimeError), heard
    finally:
        system.close()
    deadline = time.monotonic() + END_SECONDS
    while (left := everybody & {int(p.name) for p in Path("/proc").glob("[0-9]*")}) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left and not segments()
