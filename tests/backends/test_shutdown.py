"""Draining and the order of the way out."""

from __future__ import annotations

import asyncio

import pytest

from dynamo_lmcache.vllm.shutdown import InFlight, RuntimeLost, Shutdown, grace_period_s


class Scene:
    """Runtime, endpoint and engine at once; remembers what happened to it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def unregister_endpoint_instance(self) -> None:
        self.events.append("unregister")

    async def stop_engine(self) -> None:
        self.events.append("engine")

    def shutdown(self) -> None:
        self.events.append("runtime")


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", "0")


def make(scene: Scene, in_flight: InFlight, drain_timeout_s: float) -> Shutdown:
    shutdown = Shutdown(scene, in_flight, drain_timeout_s=drain_timeout_s, stop_engine=scene.stop_engine)
    shutdown._endpoints = [scene]
    return shutdown


async def test_requests_in_flight_finish_first() -> None:
    scene, in_flight = Scene(), InFlight()
    with in_flight.track():
        leaving = asyncio.ensure_future(make(scene, in_flight, 5.0).run())
        await asyncio.sleep(0.05)
        assert scene.events == ["unregister"]
    await asyncio.wait_for(leaving, timeout=5)
    assert scene.events == ["unregister", "engine", "runtime"]


async def test_draining_has_a_deadline() -> None:
    scene, in_flight = Scene(), InFlight()
    with in_flight.track():
        await asyncio.wait_for(make(scene, in_flight, 0.05).run(), timeout=5)
    assert scene.events[-1] == "runtime"


async def test_a_failing_step_does_not_stop_the_rest() -> None:
    scene = Scene()

    async def broken() -> None:
        raise OSError("no")

    shutdown = Shutdown(scene, InFlight(), drain_timeout_s=1.0, stop_engine=broken)
    await shutdown.run()
    assert scene.events == ["runtime"]


async def test_a_runtime_that_ends_untold_is_lost() -> None:
    shutdown = make(Scene(), InFlight(), 1.0)
    with pytest.raises(RuntimeLost, match="ETCD_LEASE_TTL"):
        shutdown.require_told()
    shutdown._on_signal()
    shutdown.require_told()
    assert shutdown._task is not None
    await asyncio.wait_for(shutdown._task, timeout=5)


async def test_counting_nests_and_survives_errors() -> None:
    in_flight = InFlight()
    with pytest.raises(ValueError), in_flight.track(), in_flight.track():
        assert len(in_flight) == 2
        raise ValueError
    assert len(in_flight) == 0 and await in_flight.drained(0.0)


@pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("1.5", 1.5), ("-3", 0.0), ("soon", 5.0), ("", 5.0)])
def test_grace_period(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    monkeypatch.setenv("DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS", text)
    assert grace_period_s() == seconds
