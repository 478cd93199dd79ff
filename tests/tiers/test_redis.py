"""Redis in every way that users reach it, and what becomes of faults that only a server has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.ports import free_port
from lmcache_ext.tiers import Kind, Outcome, Runner, open_tier
from lmcache_ext.tiers.redis_tier import Redis
from lmcache_ext.tiers.urls import Address
from tests.tiers.helpers import WHOLE, blank, chunk, content, end, found, key, load, store, until
from tests.tiers.redis_servers import Server, certificates

MIB = 1 << 20
Start = Callable[..., Server]
Open = Callable[..., Runner]
OPENED = {"faults": 2}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers that end with the test."""
    made: list[Server] = []

    def one(**settings: object) -> Server:
        made.append(Server(tmp_path / str(len(made)), **settings))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for server in made:
        server.stop()


def works(tier: Runner, i: int = 1) -> bool:
    return store(tier, i) is Outcome.OK and load(tier, i) is Outcome.OK and found(tier, i, 10_000) == [True, False]


# -- addresses --------------------------------------------------------------------------------------------------------


def site(url: str) -> Any:
    address = Address(url)
    made = Redis.from_address(address)
    address.finish()
    return made._site


def test_urls_say_where_servers_are() -> None:
    assert site("redis://cache").hosts == (("cache", 6379),) and not site("redis://cache").tls
    full = site("rediss://me:a%40b%3Ac@10.0.0.1:7000/3?timeout=2&connect_timeout=0.5&tls_verify=0")
    assert (full.hosts, full.db, full.username, full.password) == ((("10.0.0.1", 7000),), 3, "me", "a@b:c")
    assert (full.tls, full.tls_verify, full.timeout, full.connect_timeout) == (True, False, 2.0, 0.5)
    assert site("redis://:secret@[::1]:7000").hosts == (("::1", 7000),) and site("redis://:s@h").username is None
    assert site("valkey://h?db=2").db == 2 and not site("valkey://h").tls and site("valkeys://h").tls
    local = site("unix://me:pw@/run/redis.sock?db=1")
    assert (local.kind, local.path, local.db, local.password) == ("unix", "/run/redis.sock", 1, "pw")
    watched = site("redis-sentinel://:pw@a,b:26380?service=prod&sentinel_password=x&tls=1")
    assert (watched.kind, watched.hosts, watched.service) == ("sentinel", (("a", 26379), ("b", 26380)), "prod")
    assert (watched.password, watched.sentinel_password, watched.tls) == ("pw", "x", True)
    assert site("redis-sentinel://a").service == "mymaster"
    assert site("redis-cluster://a:7000,b").hosts == (("a", 7000), ("b", 6379))
    assert "secret" not in repr(site("redis://:secret@h"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://", "host"),
        ("redis://me:secret@", "host"),
        ("redis://me:secret@a,b", "host"),
        ("redis://me:secret@h:port", "host"),
        ("redis://me:secret@h/name", "number of a database"),
        ("redis-cluster://me:secret@h/3", "has none"),
        ("redis://me:secret@h?service=x", "not a parameter"),
        ("redis://me:secret@h?timeout=0", "greater than 0"),
        ("redis://me:secret@h?prefix=a*", "letters"),
        ("rediss://me:secret@h?tls_ca=/no/such/file", "PEM"),
    ],
)
def test_what_is_wrong_with_an_address_is_said_at_once(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        open_tier(url)
    assert "secret" not in str(refused.value)


# -- ways to reach a server -------------------------------------------------------------------------------------------


def test_a_user_with_a_password(start: Start, opened: Open) -> None:
    server = start(requirepass="everyone's")
    server.client().execute_command("ACL", "SETUSER", "engine", "on", ">pass:word", "~kvc:*", "+@all")
    tier = opened(f"redis://engine:pass%3Aword@{server.host}/2")
    assert works(tier) and works(opened(f"valkey://:everyone%27s@{server.host}"), 2)
    assert server.client().client_info()["db"] == 0 and int(server.client().info("keyspace")["db2"]["keys"]) == 1


def test_a_unix_socket(start: Start, opened: Open, quick_path: Path) -> None:
    server = start(port=0, unixsocket=quick_path / "redis.sock")
    assert works(opened(f"unix://{server.settings['unixsocket']}"))


def test_tls_proves_who_the_server_is(start: Start, opened: Open, tmp_path: Path) -> None:
    files = certificates(tmp_path / "tls")
    server = start(tls_port=free_port(), **files)
    mutual = f"tls_ca={files['tls_ca_cert_file']}&tls_cert={files['tls_cert_file']}&tls_key={files['tls_key_file']}"
    tier = opened(f"rediss://{server.host}?{mutual}")
    assert works(tier)
    big = chunk("big", 3 * MIB + 5, MIB, 0, 7)
    assert store(tier, 2, big) is Outcome.OK
    into = blank(3 * MIB + 5, MIB, 0, 7)
    assert load(tier, 2, into) is Outcome.OK and content(into) == content(big)
    assert load(opened(f"valkeys://{server.host}"), 1) is Outcome.FAILED, "its certificate is nobody's that we know"


# -- what is on the server --------------------------------------------------------------------------------------------


@pytest.fixture
def server(start: Start) -> Server:
    return start()


@pytest.fixture
def tier(server: Server, opened: Open) -> Runner:
    return opened(f"redis://{server.host}?timeout=0.5&connect_timeout=0.5")


def test_large_values_come_back_whole(server: Server, opened: Open) -> None:
    tier = opened(f"redis://{server.host}")  # with the timeouts of a user: the machine may be busy
    lengths = (16 * MIB, 8 * MIB - 1, 0, 3, 8 * MIB)
    parts = chunk("large", *lengths)
    jobs = [tier.submit_store([key(i)], [parts]) for i in range(4)]
    results: list[Any] = []
    until(lambda: (tier.wait(1), results.extend(tier.poll()), len(results) == len(jobs))[-1])
    assert all(result.ok == [True] for result in results)
    into = blank(*lengths)
    for i in range(4):
        into[0][:] = bytes(len(into[0]))
        assert load(tier, i, into) is Outcome.OK and content(into) == content(parts)


def test_an_object_has_a_name_with_its_schema_and_expires_on_the_server(server: Server, opened: Open) -> None:
    assert store(opened(f"redis://{server.host}?ttl=100"), 1) is Outcome.OK
    assert store(opened(f"redis://{server.host}?prefix=mine"), 1) is Outcome.OK
    names = sorted(server.client().keys())
    assert names == [f"kvc:1:{key(1).hex()}".encode(), f"mine:1:{key(1).hex()}".encode()]
    assert 95_000 < server.client().pttl(names[0]) <= 100_000 and server.client().pttl(names[1]) == -1
    assert server.client().strlen(names[0]) == WHOLE


def test_a_long_look_up_is_one_exchange_for_each_batch(server: Server, tier: Runner) -> None:
    for i in (0, 299, 599):
        store(tier, i)
    before = server.client().info("stats")["total_reads_processed"]
    there = found(tier, *range(600))
    assert [i for i, ok in enumerate(there) if ok] == [0, 299, 599]
    assert server.client().info("stats")["total_reads_processed"] - before < 50
    assert server.client().info("commandstats")["cmdstat_strlen"]["calls"] >= 600


def test_a_key_that_is_no_string_fails_its_batch_and_no_other(server: Server, tier: Runner) -> None:
    store(tier, 1)
    server.client().lpush(f"kvc:1:{key(2).hex()}", "?")
    assert end(tier, tier.lookup([key(1), key(2), key(3)])).outcomes == (Outcome.FAILED,) * 3
    assert found(tier, 1, 3) == [True, False] and load(tier, 1) is Outcome.OK
    assert load(tier, 2) is Outcome.FAILED


def test_no_more_connections_than_threads(server: Server, opened: Open) -> None:
    tier = opened(f"redis://{server.host}?threads=3")
    jobs = [tier.submit_store([key(i)], [chunk(i)]) for i in range(30)]
    ended: list[Any] = []
    until(lambda: (tier.wait(1), ended.extend(tier.poll()), len(ended) == len(jobs))[-1])
    assert 1 < len(server.client().client_list()) <= 3 + 1, "ours and the one that asks"
    assert tier.close(5)
    until(lambda: len(server.client().client_list()) == 1)


def test_check_lists_what_is_not_an_object(server: Server, tier: Runner) -> None:
    store(tier, 1)
    client = server.client()
    client.set("kvc:1:nonsense", "?"), client.set("somebody:else", "?"), client.set("kvc:0:old", "?")
    client.set(f"kvc:1:{key(2).hex()}", "cut off")
    faults = tier.check()
    assert len(faults) == 2 and "nonsense" in faults[0] and "cut off" in faults[1]
    assert len(tier.check(fix=True)) == 2 and len(tier.check()) == 1, "what is not ours stays"
    assert load(tier, 1) is Outcome.OK


def test_what_the_server_evicts_is_a_miss(server: Server, tier: Runner) -> None:
    client = server.client()
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + 4 * MIB)
    for i in range(12):
        assert store(tier, i, chunk(i, MIB)) is Outcome.OK
    there = found(tier, *range(12))
    assert 1 <= sum(there) <= 4 and there[11]
    gone = there.index(False)
    assert load(tier, gone, blank(MIB)) is Outcome.MISS
    assert tier.counts().trips == 0 and tier.counts().used == 0


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_full_server_that_evicts_nothing_stops_stores_alone(
    server: Server, tier: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    store(tier, 1)
    client = server.client()
    client.config_set("maxmemory", 1)
    assert [store(tier, i) for i in (2, 3, 4)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
    assert load(tier, 1) is Outcome.OK and found(tier, 1, 2) == [True, False]
    assert any("maxmemory" in record.message for record in caplog.records if record.levelno == logging.WARNING)
    client.config_set("maxmemory", 0)
    until(lambda: store(tier, 2) is Outcome.OK)
    assert load(tier, 2) is Outcome.OK


def test_a_wrong_password_is_an_outcome_until_it_is_right(start: Start, opened: Open) -> None:
    server = start(requirepass="old")
    tier = opened(f"redis://:new-secret@{server.host}")
    assert [load(tier, 1) for _ in range(3)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
    assert store(tier, 1) is Outcome.FAILED
    server.client().config_set("requirepass", "new-secret")
    until(lambda: store(tier, 1) is Outcome.OK)
    until(lambda: load(tier, 1) is Outcome.OK)


def test_a_replica_serves_loads_and_becomes_writable(server: Server, tier: Runner) -> None:
    store(tier, 1)
    server.client().execute_command("REPLICAOF", "127.0.0.1", 1)
    server.client().config_set("replica-serve-stale-data", "yes")
    assert [store(tier, i) for i in (2, 3, 4)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
    assert load(tier, 1) is Outcome.OK
    server.client().execute_command("REPLICAOF", "NO", "ONE")
    until(lambda: store(tier, 2) is Outcome.OK)


def test_a_server_that_was_killed_is_found_again(server: Server, tier: Runner) -> None:
    assert works(tier)
    server.stop()
    began = time.monotonic()
    outcomes = [load(tier, 1) for _ in range(3)]
    assert outcomes == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF] and found(tier, 1) == [False]
    assert {store(tier, 2), store(tier, 3)} <= {Outcome.FAILED, Outcome.OFF}
    assert time.monotonic() - began < 10
    server.start()
    until(lambda: store(tier, 4) is Outcome.OK)
    until(lambda: load(tier, 4) is Outcome.OK)
    assert load(tier, 1) is Outcome.MISS and tier.counts().held == 0


def test_a_server_may_come_later_than_the_engine(start: Start, opened: Open) -> None:
    server = start()
    server.stop()
    tier = opened(f"redis://{server.host}")
    assert load(tier, 1) is Outcome.FAILED
    server.start()
    until(lambda: works(tier))


def test_a_server_that_stands_still_costs_a_timeout_and_holds_nothing(server: Server, tier: Runner) -> None:
    store(tier, 1)
    server.pause()
    began = time.monotonic()
    lost = [tier.submit_load([key(1)], [blank()]), tier.submit_store([key(2)], [chunk(2)])]
    results: list[Any] = []
    until(lambda: (tier.wait(1), results.extend(tier.poll()), len(results) == 2)[-1])
    assert time.monotonic() - began < 10 and {r.job for r in results} == set(lost)
    assert {r.outcomes[0] for r in results} == {Outcome.FAILED} and not any(r.held for r in results)
    look = end(tier, tier.lookup([key(1)], timeout=0.05))
    assert look.outcomes == (Outcome.LATE,) and look.seconds < 5
    server.go_on()
    until(lambda: load(tier, 1) is Outcome.OK)
    until(lambda: store(tier, 3) is Outcome.OK)
    assert tier.counts().held == 0


def test_a_connection_that_died_while_idle_costs_nothing(server: Server, tier: Runner) -> None:
    store(tier, 1)
    server.client().client_kill_filter(_type="normal", skipme=True)
    assert load(tier, 1) is Outcome.OK and tier.counts().of(Kind.LOAD, Outcome.FAILED) == 0
