"""Mooncake Store over TCP: a real master and peers that lie, stall, fill up, die and come back."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.ports import free_port
from lmcache_ext.tiers import Outcome, Runner
from lmcache_ext.tiers.header import BLOCK
from lmcache_ext.tiers.mooncake import Mooncake, name_of
from tests.tiers.helpers import blank, chunk, content, end, found, header_of, key, load, over, store, until
from tests.tiers.mooncake_server import MIB, LeftOpen, Master, Peer, medium_with_kept_client, missing, mortal

REFUSED = {Outcome.FAILED, Outcome.OFF}
GONE = REFUSED | {Outcome.LATE, Outcome.MISS}
Open = Callable[..., Runner]


@pytest.fixture
def master() -> Iterator[Master]:
    """One that knows nothing yet."""
    if why := missing():
        pytest.skip(why)
    running = mortal()
    running.restart()
    yield running
    running.go_on()
    if running.process.poll() is not None:
        running.restart()


@pytest.fixture
def peer(master: Master) -> Iterator[Peer]:
    """16 MiB for the pool, in a process of its own."""
    running = Peer(master.settings(16))
    yield running
    running.go_on()
    running.kill()


@pytest.fixture
def opened(master: Master) -> Iterator[Open]:
    """Tiers on `master`, without memory of their own in the pool."""
    made: list[Runner] = []

    def open_one(settings: dict[str, str] | None = None, **options: Any) -> Runner:
        medium = Mooncake(settings or master.settings(0), connect=LeftOpen)
        made.append(over(medium, **{"faults": 2, "load_timeout": 0.5, "store_timeout": 0.5, **options}))
        return made[-1]

    yield open_one
    for tier in made:
        assert tier.close(10)


def timely(tier: Runner, call: Callable[[Runner, int], Outcome], i: int, seconds: float = 0.5) -> Outcome:
    """The outcome, which must come by the deadline."""
    began = time.monotonic()
    outcome = call(tier, i)
    assert time.monotonic() - began < seconds + 0.5
    return outcome


def works(tier: Runner, i: int) -> bool:
    return store(tier, i) is Outcome.OK and load(tier, i) is Outcome.OK


# -- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("http", [False, True])
def test_what_one_engine_stores_another_loads(master: Master, opened: Open, http: bool) -> None:
    where = mortal(http)
    metadata = where.http if http else "P2PHANDSHAKE"
    peer = Peer(where.settings(16, metadata))
    one, other = (opened(where.settings(0, metadata), load_timeout=5.0, store_timeout=5.0) for _ in range(2))
    parts = chunk("large", 3 * MIB, 5, 2 * MIB)
    assert store(one, 1, parts) is Outcome.OK and found(other, 0, 1) == [False, True]
    into = blank(3 * MIB, 5, 2 * MIB)
    assert load(other, 1, into) is Outcome.OK and content(into) == content(parts)
    assert end(other, other.submit_store([key(1)], [parts])).nbytes == 0, "written again"
    assert end(other, other.delete([key(1)])).ok == [True]
    assert found(one, 1) == [False] and load(one, 1) is Outcome.MISS
    peer.kill()


def test_names_carry_the_schema() -> None:
    medium = medium_with_kept_client()
    tier = over(medium)
    assert works(tier, 1) and medium._client.is_exist(f"lmcx1:{key(1).hex()}") == 1
    assert tier.close(5)


FOREIGN = {
    "ten bytes": b"0123456789",
    "text of the right length": b"x" * (BLOCK + 2 * 8192),
    "a header alone": bytes(header_of(key(1), chunk(1))),
    "cut off": content([header_of(key(1), chunk(1)), *chunk(1)])[:-1],
    "too long": content([header_of(key(1), chunk(1)), *chunk(1)]) + b"x",
    "another's": content([header_of(key(2), chunk(2)), *chunk(2)]),
    "mixed": content([header_of(key(1), chunk(1)), *chunk(2)]),
    "old": content([header_of(key(1), chunk(1), time.time() - 1), *chunk(1)]),
}


def test_what_others_planted_is_never_taken_for_ours() -> None:
    medium = medium_with_kept_client()
    tier = over(medium, faults=100)
    for how, planted in FOREIGN.items():
        assert medium._client.put(name_of(key(1)), planted) == 0
        assert load(tier, 1) in {Outcome.CORRUPT, Outcome.FOREIGN, Outcome.EXPIRED}, how
        assert found(tier, 1) == [False], how
    assert works(tier, 1) and tier.close(5)


def test_a_writer_killed_at_any_moment_leaves_whole_objects_or_none(master: Master, peer: Peer, opened: Open) -> None:
    program = (
        "from tests.tiers.helpers import *; from lmcache_ext.tiers.mooncake import Mooncake\n"
        f"tier = over(Mooncake({master.settings(0)!r}))\n"
        "for i in range(100000):\n"
        "    print(store(tier, i % 200).value, flush=True)\n"
        "    if i % 200 == 199: tier.medium._client.remove_all(True)\n"
    )
    tier = opened()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
        assert writer.stdout is not None
        for _ in range(50):
            assert writer.stdout.readline() == b"ok\n"
        writer.kill()
    outcomes = [load(tier, i) for i in range(60)]
    assert set(outcomes) <= {Outcome.OK, Outcome.MISS} and outcomes.count(Outcome.OK) >= 49


# -- faults ---------------------------------------------------------------------------------------------------------


def test_a_silent_master_costs_no_more_than_the_deadline(master: Master, peer: Peer, opened: Open) -> None:
    tier = opened()
    assert works(tier, 1)
    master.stop()
    began = time.monotonic()
    assert {timely(tier, load, 1) for _ in range(2)} == {Outcome.LATE}
    assert {timely(tier, store, i) for i in (2, 3)} == {Outcome.LATE}
    assert tier.counts().trips == 2 and load(tier, 1) is store(tier, 4) is Outcome.OFF
    assert not end(tier, tier.lookup([key(1)])).ok[0] and time.monotonic() - began < 4
    until(lambda: tier.counts().held == 0, 5)  # the threads come back, too
    master.go_on()
    until(lambda: works(tier, 5))


def test_a_master_that_was_killed_and_started_again(master: Master, peer: Peer, opened: Open) -> None:
    tier = opened()
    assert works(tier, 1)
    master.kill()
    assert {timely(tier, load, 1) for _ in range(3)} <= GONE and {timely(tier, store, i) for i in (2, 3)} <= GONE
    until(lambda: tier.counts().trips == 2)
    master.restart()
    until(lambda: works(tier, 5), 20)
    assert load(tier, 1) is Outcome.MISS, "the master forgot it"


def test_a_peer_that_stalls_or_dies_takes_only_its_objects_along(master: Master, peer: Peer, opened: Open) -> None:
    tier = opened()
    assert works(tier, 1)
    peer.stop()
    assert timely(tier, load, 1) in GONE
    peer.kill()
    assert timely(tier, load, 1) in GONE
    other = Peer(master.settings(16))
    try:
        until(lambda: works(tier, 2), 20)
        assert load(tier, 1) in GONE
    finally:
        other.kill()


def test_a_full_store_refuses_and_still_gives_back(master: Master, peer: Peer, opened: Open) -> None:
    tier = opened(faults=3, cooldown_max=0.2, load_timeout=5.0, store_timeout=5.0)
    parts = chunk("big", 3 * MIB)
    outcomes = [store(tier, i, parts) for i in range(12)]  # the master evicts beside them, now and then in time
    assert outcomes[0] is Outcome.OK and Outcome.FAILED in outcomes and set(outcomes) <= {Outcome.OK, *REFUSED}
    until(lambda: store(tier, 99) is Outcome.OK)
    before, never_fits = tier.counts().trips, chunk("huge", 17 * MIB)
    assert [store(tier, i, never_fits) for i in range(12, 15)] == [Outcome.FAILED] * 3
    assert tier.counts().trips == before + 1

    def comes_back(number: int) -> bool:
        into = blank(3 * MIB)
        outcome = load(tier, number, into)
        assert outcome is Outcome.MISS or (outcome is Outcome.OK and content(into) == content(parts))
        return outcome is Outcome.OK  # or nothing was written, or the master has evicted it meanwhile

    for i in range(12):
        comes_back(i)
    until(lambda: store(tier, 100, parts) is Outcome.OK and comes_back(100), 30)


def test_no_memory_in_the_pool_is_a_store_that_failed(master: Master, opened: Open) -> None:
    tier = opened()
    assert timely(tier, store, 1) is Outcome.FAILED and timely(tier, load, 1) is Outcome.MISS
    peer = Peer(master.settings(16))
    try:
        until(lambda: works(tier, 1))
    finally:
        peer.kill()


class Watch:
    """The longest time in which no other thread ran."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(timeout=0.005):
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(5)


def test_a_master_that_is_not_there_yet_stops_nobody(
    master: Master, peer: Peer, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lmcache_ext.tiers")
    master.stop()
    with Watch() as silent:
        tier = opened()
        assert timely(tier, load, 1) in GONE
    assert "no answer from" in caplog.text
    master.go_on()
    until(lambda: works(tier, 1))
    master.kill()
    with Watch() as gone:
        other = opened()
        assert [timely(other, load, 1) for _ in range(3)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
    master.restart()
    until(lambda: works(other, 1), 20)
    assert max(silent.longest, gone.longest) < 0.5, "the interpreter stood still"


def test_settings_that_mooncake_refuses_are_refused(master: Master) -> None:
    settings = {**master.settings(0), "protocol": "pigeon"}
    with pytest.raises(ConfigError, match="refused with error"):
        Mooncake(settings).open()
    missing_metadata = master.settings(0, f"http://127.0.0.1:{free_port()}/metadata")
    medium = Mooncake(missing_metadata)
    medium.open()
    with pytest.raises(OSError, match="no answer"):
        medium.size(key(1))


def test_transfers_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    medium = medium_with_kept_client(transfers=2)
    tier = over(medium)
    assert works(tier, 100)
    lock, now, most = threading.Lock(), 0, 0
    put = medium._client.batch_put_from_multi_buffers

    def counted(*arguments: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return put(*arguments)

    monkeypatch.setattr(medium._client, "batch_put_from_multi_buffers", counted, raising=False)
    assert end(tier, tier.submit_store([key(i) for i in range(12)], [chunk(i) for i in range(12)])).ok == [True] * 12
    assert most == 2 and tier.close(5)


def test_a_real_close(master: Master, peer: Peer) -> None:
    tier = over(Mooncake(master.settings(0)))
    assert works(tier, 1) and tier.close(10)
    again = over(Mooncake(master.settings(0), connect=LeftOpen))
    assert load(again, 1) is Outcome.OK and again.close(10)
