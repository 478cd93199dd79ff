"""Whoever waits in vLLM's shared-memory queue sleeps on the CPU platform, and only there."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

import pytest
from vllm.distributed import utils
from vllm.distributed.device_communicators import shm_broadcast
from vllm.platforms import current_platform

from dynamo_lmcache.vllm import cpu_wait


@pytest.fixture(autouse=True)
def as_vllm_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "sched_yield", os.sched_yield)
    monkeypatch.setattr(shm_broadcast, "sched_yield", os.sched_yield)


def sleeps(of: Callable[[], None], seconds: float) -> tuple[int, int]:
    """(looks, times that the core was given away) of a wait of so long."""
    before, looks = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw, 0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        of()
        looks += 1
    return looks, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before


@pytest.mark.parametrize("module", [utils, shm_broadcast])
def test_a_wait_is_a_sleep_that_grows(module: object) -> None:
    cpu_wait.register()
    cpu_wait.register()
    looks, slept = sleeps(module.sched_yield, 0.2)  # type: ignore[attr-defined]
    assert looks * 0.9 <= slept and 50 < looks < 400


def test_the_next_wait_begins_short() -> None:
    sleeps(cpu_wait.nap, 0.1)
    shortest = []
    for _ in range(20):
        time.sleep(0.001)  # it has found something, and works
        began = time.monotonic()
        cpu_wait.nap()
        shortest.append(time.monotonic() - began)
    assert min(shortest) < 0.0005


def test_other_platforms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    cpu_wait.register()
    assert utils.sched_yield is os.sched_yield


def test_a_vllm_that_waits_in_another_way_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(shm_broadcast, "sched_yield")
    cpu_wait.register()
    assert "may starve others" in caplog.text
