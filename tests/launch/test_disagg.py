"""Prefill and decode apart behind the KV router, with etcd and NATS: what decode gets comes by NIXL, what prefill need
not compute from our cache. With files and TCP: test_kill.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_ext.ports import free_port
from tests.launch.processes import listens
from tests.launch.routing import TOKENS, Frontend, prompt
from tests.launch.script import START_S, STOP_S, Script, serving

pytestmark = [pytest.mark.engine, pytest.mark.timeout(START_S + STOP_S + 120)]

NIXL_BYTES, HITS = "vllm:nixl_bytes_transferred_sum", "lmcache:num_hit_tokens_total"


def prove(script: Script, decode: int, prefill: list[int]) -> None:
    """The printed curl twice: right answers, prefill's own hits as cached_tokens, and KV that came by NIXL."""
    command, promised, text = script.promise()
    moved = []
    for cached in (0, promised):
        answer = script.curl(command)
        assert answer["choices"][0]["text"] == text
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
        moved.append(script.metric(decode, NIXL_BYTES))
    assert 0 < moved[0] < moved[1]
    assert sum(script.metric(i, HITS) for i in prefill) == promised
    assert script.metric(decode, HITS) == 0


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A NATS server of our own that counts: (port, port of its monitor)."""
    if shutil.which("nats-server") is None or shutil.which("etcd") is None:
        pytest.skip("needs Debian's etcd-server and nats-server")
    port, monitor = free_port(), free_port()
    server = subprocess.Popen(["nats-server", "-a", "127.0.0.1", "-p", str(port), "-m", str(monitor), "-js",
                               "-sd", str(tmp_path / "nats")], stderr=subprocess.DEVNULL)  # fmt: skip
    yield port, monitor
    server.terminate()
    server.wait(20)


def messages(monitor: int) -> int:
    """How many the server has taken in."""
    with urllib.request.urlopen(f"http://127.0.0.1:{monitor}/varz", timeout=10) as answer:
        return int(json.load(answer)["in_msgs"])


def tells_all(script: Script, worker: int) -> bool:
    """Whether /metrics has the engine's metrics, the cache's and Dynamo's."""
    names = ("vllm:prompt_tokens_total", "lmcache:num_stored_tokens_total", "dynamo_component_total_blocks")
    return all(script.metric(worker, name) > 0 for name in names)


def test_etcd_and_nats_behind_the_kv_router(tmp_path: Path, nats: tuple[int, int]) -> None:
    port, monitor = nats
    flags = ["--no-enable-prefix-caching", "--no-warmup", "--enforce-eager"]
    env = {"DYN_DISCOVERY_BACKEND": "etcd", "NATS_SERVER": f"nats://127.0.0.1:{port}", "PREFILL_WORKERS": "1",
           "DECODE_ENABLE_LMCACHE": "1"}  # fmt: skip
    runs_already = listens(2379)
    with serving(tmp_path, "disagg_router.sh", *flags, **env) as script:
        assert ("starting etcd" in script.output) != runs_already
        assert "starting nats" not in script.output
        before = messages(monitor)
        prove(script, decode=0, prefill=[1])
        time.sleep(1)
        assert messages(monitor) > before + 4, "requests and events go through NATS"
        assert tells_all(script, 0) and tells_all(script, 1)
        frontend = Frontend(script.http_port, tmp_path / "frontend.log")
        told = [frontend.ask(prompt(1)).sources for _ in range(2)]
        assert told == [{"gpu_cache": 0, "host_memory": hits, "computed": TOKENS + 1 - hits} for hits in (0, TOKENS)]
        assert script.listeners() == set()
        script.interrupt()
