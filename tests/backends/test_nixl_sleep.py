"""The plugin that lets NIXL's progress thread sleep, on the real bindings."""

from __future__ import annotations

import time
from typing import Any

import pytest

from dynamo_lmcache.vllm import nixl_sleep
from dynamo_lmcache.vllm.settings import SettingError


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Any:
    api = pytest.importorskip("nixl._api")
    monkeypatch.setattr(api.nixlBind, "nixlAgentConfig", api.nixlBind.nixlAgentConfig)
    monkeypatch.setattr(api.nixlBind, nixl_sleep._PATCHED, None, raising=False)
    return api.nixlBind


def test_without_the_variable_nothing_changes(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(nixl_sleep.SLEEP_VARIABLE, raising=False)
    before = bindings.nixlAgentConfig
    nixl_sleep.register()
    assert bindings.nixlAgentConfig is before


def test_zero_becomes_the_delay_and_other_values_stay(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nixl_sleep.SLEEP_VARIABLE, "1500")
    nixl_sleep.register()
    nixl_sleep.register()
    config = bindings.nixlAgentConfig()
    config.pthrDelay = 0
    assert config.pthrDelay == 1500
    config.pthrDelay = 7
    assert config.pthrDelay == 7


def test_an_idle_agent_leaves_the_core_alone(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import nixl._api as api

    monkeypatch.setenv(nixl_sleep.SLEEP_VARIABLE, "1000")
    nixl_sleep.register()
    agent = api.nixl_agent("sleeper", api.nixl_agent_config(backends=["UCX"]))
    time.sleep(0.3)
    before = time.process_time()
    time.sleep(1.0)
    used = time.process_time() - before
    del agent
    assert used < 0.3, f"{used:.2f} s of CPU in one idle second"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "fast"])
def test_bad_delays_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(nixl_sleep.SLEEP_VARIABLE, text)
    with pytest.raises(SettingError, match="LMCACHE_NIXL_SLEEP_US"):
        nixl_sleep.register()
