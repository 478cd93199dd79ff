"""Several servers: the slots of a cluster, wherever they move, and the master that sentinels name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot
from redis.exceptions import ConnectionError, ResponseError

from lmcache_ext.ports import free_port
from lmcache_ext.tiers import Outcome, Runner
from lmcache_ext.tiers.redis_tier import Redis
from tests.tiers.helpers import blank, chunk, content, end, found, key, load, store, until
from tests.tiers.redis_servers import Server, cluster_of

NODES = 3
Open = Callable[..., Runner]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    made = cluster_of(tmp_path_factory.mktemp("cluster"), NODES, requirepass="cluster's", masterauth="cluster's")
    yield made
    for node in made:
        node.stop()


@pytest.fixture
def tier(nodes: list[Server], opened: Open) -> Runner:
    for node in nodes:
        node.client().flushall()
    return opened(f"redis-cluster://:cluster%27s@{nodes[1].host},{nodes[0].host}?timeout=1")


def name(tier: Runner, i: int) -> str:
    assert isinstance(tier.medium, Redis)
    return tier.medium.name(key(i))


def slot(tier: Runner, i: int) -> int:
    return int(key_slot(name(tier, i).encode()))


def key_in(tier: Runner, node: int, but: int = -1) -> int:
    """The number of a key whose slot `node` has."""
    share = 16384 / NODES
    return next(i for i in range(1000) if int(slot(tier, i) / share) == node and i != but)


def ids(nodes: list[Server]) -> list[str]:
    return [node.client().execute_command("CLUSTER", "MYID").decode() for node in nodes]


def test_a_cluster_holds_objects_on_all_its_nodes(nodes: list[Server], tier: Runner) -> None:
    numbers = range(30)
    stored = end(tier, tier.submit_store([key(i) for i in numbers], [chunk(i) for i in numbers]))
    assert all(stored.ok)
    counts = [node.client().dbsize() for node in nodes]
    assert sum(counts) == 30 and min(counts) > 0
    assert found(tier, *range(60)) == [True] * 30 + [False] * 30
    into = [blank() for _ in numbers]
    assert all(end(tier, tier.submit_load([key(i) for i in numbers], into)).ok)
    assert [content(parts) for parts in into] == [content(chunk(i)) for i in numbers]
    assert all(end(tier, tier.delete([key(i) for i in range(15)])).ok)
    assert found(tier, *numbers) == [False] * 15 + [True] * 15 and tier.check() == []


def test_a_slot_that_moved_is_followed(nodes: list[Server], tier: Runner) -> None:
    i = key_in(tier, 0)
    assert store(tier, i) is Outcome.OK
    end(tier, tier.delete([key(i)]))
    names = ids(nodes)
    try:
        for node in (nodes[2], nodes[0], nodes[1]):
            node.client().execute_command("CLUSTER", "SETSLOT", slot(tier, i), "NODE", names[2])
        assert load(tier, i) is Outcome.MISS and store(tier, i) is Outcome.OK and load(tier, i) is Outcome.OK
        assert found(tier, i) == [True] and nodes[2].client().exists(name(tier, i)) == 1
        end(tier, tier.delete([key(i)]))
        assert tier.counts().trips == 0
    finally:
        for node in nodes:
            node.client().execute_command("CLUSTER", "SETSLOT", slot(tier, i), "NODE", names[0])


def test_a_slot_that_is_moving_is_asked_for_where_it_goes(nodes: list[Server], tier: Runner) -> None:
    i = key_in(tier, 0)
    names, number = ids(nodes), slot(tier, i)
    store(tier, key_in(tier, 0, but=i)), store(tier, i)
    end(tier, tier.delete([key(i)]))
    try:
        nodes[1].client().execute_command("CLUSTER", "SETSLOT", number, "IMPORTING", names[0])
        nodes[0].client().execute_command("CLUSTER", "SETSLOT", number, "MIGRATING", names[1])
        assert load(tier, i) is Outcome.MISS and store(tier, i) is Outcome.OK and load(tier, i) is Outcome.OK
        assert tier.counts().trips == 0 and nodes[1].client().dbsize() == 1
    finally:
        nodes[1].client().flushall()
        for node in nodes[:2]:
            node.client().execute_command("CLUSTER", "SETSLOT", number, "STABLE")


def test_a_dead_node_takes_only_its_own_along_and_comes_back(nodes: list[Server], tier: Runner) -> None:
    numbers = [key_in(tier, node) for node in range(NODES)]
    assert [store(tier, i) for i in numbers] == [Outcome.OK] * NODES
    nodes[2].stop()
    try:
        assert load(tier, numbers[2]) is Outcome.FAILED
        assert [load(tier, i) for i in numbers[:2]] == [Outcome.OK] * 2
        until(lambda: load(tier, numbers[2]) is Outcome.OFF)
        until(lambda: load(tier, numbers[0]) is Outcome.OK)
    finally:
        nodes[2].start()
    until(lambda: store(tier, numbers[2]) is Outcome.OK)
    until(lambda: load(tier, numbers[2]) is Outcome.OK)


def test_a_cluster_that_is_not_there_is_an_outcome(opened: Open) -> None:
    tier = opened(f"redis-cluster://127.0.0.1:{free_port()}", faults=2)
    assert [load(tier, 1) for _ in range(3)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]


def fails_over(sentinel: Any) -> bool:
    try:
        return bool(sentinel.execute_command("SENTINEL", "FAILOVER", "kv"))
    except ResponseError:
        return False  # it does not know the replica well enough yet


def role(server: Server) -> str:
    try:
        return str(server.client().info("replication")["role"])
    except ConnectionError:
        return "changing"  # sentinel cuts connections then


def test_the_master_that_sentinels_name_is_used_also_after_a_failover(tmp_path: Path, opened: Open) -> None:
    made = [Server(tmp_path / "0", repl_diskless_sync_delay=0)]
    try:
        made.append(Server(tmp_path / "1", replicaof=f"127.0.0.1 {made[0].port}"))
        until(lambda: made[1].client().info("replication")["master_link_status"] == "up")
        watch = tmp_path / "sentinel.conf"
        port = free_port()
        watch.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor kv 127.0.0.1 {made[0].port} 1\n")
        made.append(Server(tmp_path / "2", port=port, config=watch))
        sentinel = made[2].client()
        sentinel.execute_command("SENTINEL", "DEBUG", "info-period", 100, "ping-period", 100, "publish-period", 100)
        tier = opened(f"redis-sentinel://127.0.0.1:{port}?service=kv", faults=2)
        assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK
        until(lambda: fails_over(sentinel), 20)
        until(lambda: role(made[1]) == "master" and role(made[0]) == "slave", 20)
        until(lambda: store(tier, 2) is Outcome.OK)
        until(lambda: load(tier, 2) is Outcome.OK)
        assert made[1].client().exists(name(tier, 2)) == 1
    finally:
        for server in made:
            server.stop()
