"""NIXL's progress thread sleeps, and its connector leaves the main thread where it was: on the real bindings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from dynamo_lmcache.vllm import nixl_cpu
from dynamo_lmcache.vllm.settings import SettingError


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Any:
    api = pytest.importorskip("nixl._api")
    monkeypatch.setattr(api.nixlBind, "nixlAgentConfig", api.nixlBind.nixlAgentConfig)
    monkeypatch.setattr(api.nixlBind, nixl_cpu._PATCHED, None, raising=False)
    monkeypatch.setattr(KVConnectorFactory, "create_connector", KVConnectorFactory.create_connector)
    return api.nixlBind


def test_without_the_variable_nothing_changes(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(nixl_cpu.SLEEP_VARIABLE, raising=False)
    before = bindings.nixlAgentConfig
    nixl_cpu.register()
    assert bindings.nixlAgentConfig is before


def test_zero_becomes_the_delay_and_other_values_stay(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nixl_cpu.SLEEP_VARIABLE, "1500")
    nixl_cpu.register()
    nixl_cpu.register()
    config = bindings.nixlAgentConfig()
    config.pthrDelay = 0
    assert config.pthrDelay == 1500
    config.pthrDelay = 7
    assert config.pthrDelay == 7


def test_an_idle_agent_leaves_the_core_alone(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import nixl._api as api

    monkeypatch.setenv(nixl_cpu.SLEEP_VARIABLE, "1000")
    nixl_cpu.register()
    agent = api.nixl_agent("sleeper", api.nixl_agent_config(backends=["UCX"]))
    time.sleep(0.3)
    before = time.process_time()
    time.sleep(1.0)
    used = time.process_time() - before
    del agent
    assert used < 0.3, f"{used:.2f} s of CPU in one idle second"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "fast"])
def test_bad_delays_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(nixl_cpu.SLEEP_VARIABLE, text)
    with pytest.raises(SettingError, match="LMCACHE_NIXL_SLEEP_US"):
        nixl_cpu.register()


def test_a_connector_that_moves_the_thread_is_undone(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one core: nowhere to move to")

    def create(config: str, role: str = "") -> str:
        os.sched_setaffinity(0, {max(before)})
        return config + role

    monkeypatch.setattr(KVConnectorFactory, "create_connector", create)
    monkeypatch.setenv(nixl_cpu.SLEEP_VARIABLE, "1000")
    nixl_cpu.register()
    nixl_cpu.register()
    try:
        assert KVConnectorFactory.create_connector("made ", role="so") == "made so"
        assert os.sched_getaffinity(0) == before
    finally:
        os.sched_setaffinity(0, before)


DEAF = """
import threading
from dynamo_lmcache.vllm import nixl_cpu

def listen():
    raise OSError("Address already in use")

nixl_cpu.register()
ready = threading.Event()
threading.Thread(target=listen, name="{name}").start()
ready.wait({seconds})  # as vLLM's scheduler does, without a deadline
print("still there")
"""


@pytest.mark.parametrize(("name", "status"), [("nixl_handshake_listener", -signal.SIGTERM), ("another", 0)])
def test_an_engine_whose_side_channel_has_died_ends(name: str, status: int) -> None:
    source = DEAF.format(name=name, seconds="" if status else "1")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert ("VLLM_NIXL_SIDE_CHANNEL_PORT" in done.stderr) is bool(status)
    assert "Address already in use" in done.stderr
