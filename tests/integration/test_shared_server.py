"""LMCacheMPConnector at a cache server, under vLLM's real Scheduler: the harness checks every page that is read."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.integration.vllm import impl, seat
from lmcache_ext.ports import free_port
from lmcache_ext.telemetry import Silent
from tests.integration import harness
from tests.integration.harness import Engine, Setup, prompt
from tests.integration.scenarios import ALL, Router, copying, slow
from tests.server.helpers import Server, clean, until

# Those that look at our own pool, at its directory, at events, or count on an engine finding nothing of the one before.
OWN_POOL = {
    "a_pool_that_cannot_be_opened_is_no_cache", "a_router_never_forgets_what_is_there", "a_router_sees_evictions",
    "decode_cache_serves_the_second_turn", "events_follow_the_chunks", "failed_loads_are_computed",
    "faults_in_hooks_become_misses", "fuller_chunk_replaces_the_partial_one", "hits_are_told_by_tier_if_asked",
    "local_cpu_off_finds_nothing", "mla_is_stored_once_and_read_by_all", "second_request_hits_exactly_its_prefix",
    "only_a_short_load_on_an_idle_engine_is_part_of_its_step", "small_pool_evicts_and_stays_right",
    "stores_as_far_as_the_pool_has_grown",
    "blocks_that_the_next_step_computed_from_a_failed_load_are_spoilt_too",
}  # fmt: skip


@pytest.fixture(scope="module")
def _running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), "--silence-seconds", "1", "--chunk-size", "64") as running:
        yield running
        assert running.status()["errors"].get("internal", 0) == 0
        assert running.stop() == 0


@pytest.fixture
def server(_running: Server) -> Server:
    return clean(_running)


@pytest.fixture
def engines(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Engine]]:
    """Every engine that the harness makes joins the server; all leave in the end."""
    made: list[Engine] = []
    config, init = harness.vllm_config, Engine.__init__

    def joined(setup: Setup) -> Any:
        setup.connector, setup.step_seconds = "LMCacheMPConnector", 0.002
        setup.extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port, **setup.extra}
        return config(setup)

    def begun(self: Engine, setup: Setup) -> None:
        init(self, setup)
        made.append(self)
        self.drain()  # as vLLM's busy loop does before it waits for requests

    monkeypatch.setattr(harness, "vllm_config", joined)
    monkeypatch.setattr(Engine, "__init__", begun)
    yield made
    for engine in made:
        engine.scheduler.connector.shutdown()


def in_use(engine: Engine) -> bool:
    """Whether the engine uses the server; steps it once, as any request would."""
    engine.step()
    return engine.total("server_in_use") == 1


def counted(server: Server, name: str) -> int:
    return int(server.status()["tally"][name])


@pytest.mark.parametrize("name", [name for name in ALL if name not in OWN_POOL])
def test_scenario(name: str, engines: list[Engine]) -> None:
    ALL[name]()


def test_one_engine_finds_what_another_has_stored(server: Server, engines: list[Engine]) -> None:
    first, second = Engine(Setup()), Engine(Setup(ranks=1))
    p = prompt(1, 300)
    cold, none = first.ask(p, max_tokens=5)
    assert none == 0
    assert second.ask(p, max_tokens=5) == (cold, 288)
    assert first.ask(p[:200] + prompt(2, 90), max_tokens=5)[1] == 192
    first.close(), second.close()
    assert until(lambda: server.state()[1] == 0), server.status()  # nothing is held


def test_other_models_and_rank_counts_share_nothing(server: Server, engines: list[Engine]) -> None:
    p = prompt(1, 300)
    Engine(Setup()).ask(p)
    two = Engine(Setup(ranks=2))
    cold, none = two.ask(p)
    assert none == 0
    two.forget_gpu()
    assert two.ask(p) == (cold, 288)
    mla = Engine(Setup(ranks=2, mla=True))
    assert mla.ask(p)[1] == 0
    mla.forget_gpu()
    assert mla.ask(p)[1] == 288
    two.close(), mla.close()


def test_the_servers_chunk_size_is_taken_unless_another_is_set(server: Server, engines: list[Engine]) -> None:
    setup = Setup(chunk=128)
    assert Engine(setup).side.config.chunk_size == 128
    config = harness.vllm_config(setup)
    del config.kv_transfer_config.kv_connector_extra_config["lmcache.chunk_size"]
    before = harness.vllm_config
    harness.vllm_config = lambda _: config  # the fixture puts its own back
    try:
        assert Engine(setup).side.config.chunk_size == 64
    finally:
        harness.vllm_config = before


def test_a_killed_server_is_a_miss_and_a_new_one_is_joined(server: Server, engines: list[Engine]) -> None:
    e = Engine(Setup(caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    assert e.ask(p) == (cold, 288)
    server.process.kill()
    server.process.wait(10)
    began = time.monotonic()
    assert e.ask(p) == (cold, 0)
    assert time.monotonic() - began < 10
    server.start()
    assert until(lambda: in_use(e), 10)
    assert e.ask(p) == (cold, 0)  # its memory is a new one
    assert e.ask(p) == (cold, 288)
    e.close()


def test_a_server_killed_under_traffic_costs_no_wrong_token(server: Server, engines: list[Engine]) -> None:
    e = Engine(Setup(caching=False))
    for i in range(60):
        e.add(prompt(i % 4, 300), max_tokens=3)
        e.step()
        if i in (20, 40):
            server.process.kill()
            server.process.wait(10)
            server.start()
    e.run()
    assert until(lambda: in_use(e), 10)
    e.close()


def test_a_stopped_server_costs_one_deadline(server: Server, engines: list[Engine]) -> None:
    e = Engine(Setup(caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    server.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert e.ask(p) == (cold, 0)
        assert time.monotonic() - began < 10
        began = time.monotonic()
        for i in range(40):
            assert e.ask(prompt(2 + i, 100))[1] == 0
        assert time.monotonic() - began < 5  # nobody waits again
    finally:
        server.signal(signal.SIGCONT)
    assert until(lambda: in_use(e), 10)
    assert until(lambda: e.ask(p) == (cold, 288), 10)
    e.close()


def test_an_engine_starts_without_a_server_and_joins_later(server: Server, engines: list[Engine]) -> None:
    server.stop()
    e = Engine(Setup(caching=False))
    p = prompt(1, 300)
    cold, _ = e.ask(p)
    assert e.ask(p) == (cold, 0)
    server.start()
    assert until(lambda: in_use(e), 10)
    e.ask(p)
    assert e.ask(p) == (cold, 288)
    e.close()


def test_a_reset_is_this_engines_own(server: Server, engines: list[Engine]) -> None:
    first, second = Engine(Setup(caching=False)), Engine(Setup(caching=False))
    p = prompt(1, 300)
    cold, _ = first.ask(p)
    assert first.connector.reset_cache()
    assert until(lambda: in_use(first), 5)
    assert first.ask(p) == (cold, 0)
    assert first.ask(p) == (cold, 288)
    assert second.ask(p) == (cold, 288)
    assert second.connector.reset_cache()  # as often as the first: still not the same, weights may differ
    assert until(lambda: in_use(second), 15)
    assert second.ask(p) == (cold, 0)
    first.close(), second.close()


def test_many_resets_leave_no_groups_behind(server: Server, engines: list[Engine]) -> None:
    e, p = Engine(Setup(caching=False)), prompt(1, 300)
    for _ in range(300):  # a server has at most 256 groups
        assert e.connector.reset_cache()
        assert until(lambda: in_use(e), 15)
    assert len(server.status()["groups"]) < 256
    assert e.ask(p)[1] == 0
    assert e.ask(p)[1] == 288
    e.close()


def test_shares_of_salts_hold(server: Server, engines: list[Engine]) -> None:
    e = Engine(Setup(caching=False))
    p = prompt(1, 300)
    assert server.ask("PUT", "/quota/greedy", {"limit_gb": 0.0})[0] == 200
    try:
        e.ask(p, cache_salt="greedy")
        assert e.ask(p, cache_salt="greedy")[1] == 0
        e.ask(p, cache_salt="modest")
        assert e.ask(p, cache_salt="modest")[1] == 288
    finally:
        server.ask("DELETE", "/quota/greedy")
    e.close()


def at_server(server: Server, e: Engine, router: Router) -> bool:
    """Whether the router knows just what the server holds, all of which this engine has told; steps the engine once."""
    e.step()
    told = e.side.lower.chunks()
    there = int(server.ask("GET", "/cache/objects?tier=l1")[1]["total"])
    return len(told) == there and len(router.blocks) == sum(len(each.note.block_hashes) for each in told)


def test_a_router_knows_what_the_server_holds(server: Server, engines: list[Engine]) -> None:
    first, second = Engine(Setup(events=True)), Engine(Setup(events=True))
    routers = [Router(first), Router(second)]
    p = prompt(1, 300)
    first.ask(p)
    assert until(lambda: at_server(server, first, routers[0]), 15) and len(routers[0].blocks) == 9
    assert not routers[1].blocks
    second.ask(p)  # what it has loaded once it can load again
    assert until(lambda: at_server(server, second, routers[1]), 15) and routers[1].blocks == routers[0].blocks
    first.forget_gpu()  # vLLM says that all is gone, and we that host memory has it
    routers[0].blocks.clear()
    assert until(lambda: at_server(server, first, routers[0]), 15) and len(routers[0].blocks) == 9
    server.ask("POST", "/cache/clear")
    assert until(lambda: at_server(server, first, routers[0]) and at_server(server, second, routers[1]), 15)
    assert not routers[0].blocks and not routers[1].blocks
    first.close(), second.close()


def test_a_router_forgets_what_the_server_evicts_or_loses(
    server: Server, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seat, "_SILENT_SECONDS", 1e9)
    e = Engine(Setup(events=True, caching=False, blocks=128))
    router = Router(e)
    assert server.ask("PUT", "/quota/narrow", {"limit_gb": 20 * 4096 / 2**30})[0] == 200
    try:
        for seed in range(8):
            e.ask(prompt(seed, 300), cache_salt="narrow")
        assert until(lambda: at_server(server, e, router), 15) and 0 < len(router.blocks) < 8 * 9
        e.ask(prompt(0, 300), cache_salt="narrow")  # it was among those that left, and is there again
        assert until(lambda: at_server(server, e, router), 15)
    finally:
        server.ask("DELETE", "/quota/narrow")
    server.process.kill()
    server.process.wait(10)
    e.ask(prompt(1, 100))
    assert router.blocks  # it may be slow
    monkeypatch.setattr(seat, "_SILENT_SECONDS", 0.5)
    assert until(lambda: (e.step(), not router.blocks)[1], 10)
    monkeypatch.setattr(seat, "_SILENT_SECONDS", 1e9)
    server.start()
    assert until(lambda: in_use(e), 10)
    e.ask(prompt(1, 300))
    assert until(lambda: at_server(server, e, router), 15) and len(router.blocks) == 9
    assert e.connector.reset_cache()
    assert until(lambda: (e.step(), not router.blocks)[1])
    e.close()
    server.ask("POST", "/cache/clear")


def test_what_an_engine_held_goes_back(server: Server, engines: list[Engine]) -> None:
    e = Engine(Setup(blocks=30, caching=False))
    p = prompt(1, 300)
    e.ask(p)
    for seed in range(6):
        request_id = e.add(p if seed % 2 else prompt(9 + seed, 300), max_tokens=3)
        for _ in range(seed):
            e.step()
        e.abort(request_id)
    e.drain()
    assert until(lambda: server.state()[1] == 0), server.status()
    e.close()


def test_a_server_is_started_where_none_answers(
    tmp_path: Path, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, pids = free_port(), []
    import subprocess

    popen: Callable[..., Any] = subprocess.Popen

    def kept(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, **kwargs)
        pids.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", kept)
    flags = f"--l1-size-gb 0.0625 --http-port {free_port()}"
    extra = {
        "lmcache.mp.port": port, "lmcache.mp.autostart": True, "lmcache.mp.autostart.server_args": flags,
        "lmcache.mp.autostart.wait_timeout": 30,
    }  # fmt: skip
    try:
        e = Engine(Setup(caching=False, extra=extra))
        p = prompt(1, 300)
        cold, _ = e.ask(p)
        assert e.ask(p) == (cold, 288)
        e.close()
        other = Engine(Setup(caching=False, extra=extra))  # finds that one
        assert other.ask(p) == (cold, 288)
        other.close()
        assert len(pids) == 1
    finally:
        for process in pids:
            process.terminate()
            process.wait(10)


def test_a_server_to_start_needs_a_size(engines: list[Engine]) -> None:
    extra = {"lmcache.mp.port": free_port(), "lmcache.mp.autostart": True, "lmcache.max_local_cpu_size": None}
    with pytest.raises(ConfigError, match="l1-size-gb"):
        Engine(Setup(extra=extra))


def test_requests_that_end_in_their_first_step_are_stored(server: Server, engines: list[Engine]) -> None:
    first, second = Engine(Setup(blocks=600, budget=900)), Engine(Setup())
    first.setup.step_seconds = 0.0  # they are over before the server has given them slots
    ids = [first.add(prompt(i, 200)) for i in range(12)]
    first.run(*ids)
    first.drain()
    assert first.total("num_skipped_store_tokens") == 0
    for i in range(12):
        assert second.ask(prompt(i, 200))[1] == 192
    first.close(), second.close()


def test_stored_is_said_when_others_can_find_it(
    server: Server, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, bool, int]] = []

    class Heard(Silent):
        def report(self, request_id: str, stored: bool) -> None:
            heard.append((request_id, stored, server.ask("GET", "/cache/objects?tier=l1")[1]["total"]))

    monkeypatch.setattr(impl, "open_telemetry", lambda *_: Heard())
    e = Engine(Setup(caching=False))
    for i in range(5):
        e.ask(prompt(i, 300))
    assert [(request_id, stored) for request_id, stored, _ in heard] == [(f"r{i + 1}", True) for i in range(5)]
    assert [count for _, _, count in heard] == [5, 10, 15, 20, 25]
    e.close()


def test_what_was_lost_with_its_server_is_not_said_to_be_stored(
    server: Server, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, bool]] = []

    class Heard(Silent):
        def report(self, request_id: str, stored: bool) -> None:
            heard.append((request_id, stored))

    monkeypatch.setattr(impl, "open_telemetry", lambda *_: Heard())
    with copying(slow(0.3, "store")):
        e = Engine(Setup(caching=False))
    request_id = e.add(prompt(1, 300))
    e.run(request_id)
    mirror = e.side.directory
    assert until(lambda: bool(mirror._writes) or (e.step(), False)[1], 5)
    mirror.use(None)  # as when the session is over
    e.drain()
    assert heard == [(request_id, False)]
    assert not mirror._publishing
    e.close()
    server.ask("POST", "/cache/clear")
