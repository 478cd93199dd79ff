"""Slots for receivers, from a Directory: all or none, writers together, held until they are fetched."""

from __future__ import annotations

import threading
import time

import pytest

from lmcache_ext.engine.directory import Directory
from lmcache_ext.pd import DirectoryStore
from lmcache_ext.policies import POLICIES
from tests.pd.peers import keys


class Engine:
    """A directory of `slots` and its store; every test ends with a check."""

    def __init__(self, slots: int, writers: int = 1, ttl_s: float = 60.0) -> None:
        self.writers = writers
        self.directory = Directory(POLICIES.get("LRU")())
        self.directory.grow(slots)
        self.store = DirectoryStore(self.directory, threading.Lock(), ttl_s)

    def reserve(self, name: str, count: int, writer: int = 0, req_id: str = ""):
        return self.store.reserve(req_id or name, writer, self.writers, keys(name, count), [256] * count)

    def commit(self, places) -> None:
        for place in places:
            if place.ticket:
                self.store.commit(place.ticket)

    def clean(self) -> bool:
        return self.directory.leases == 0 and self.directory.check() == []


@pytest.fixture
def engine():
    made = Engine(8)
    yield made
    assert made.directory.check() == []


def test_chunks_are_seen_when_committed_and_kept_until_claimed(engine):
    places = engine.reserve("a", 4)
    assert engine.directory.match(keys("a", 4)) == 0
    engine.commit(places[:2])
    assert engine.directory.match(keys("a", 4)) == 2
    engine.commit(places[2:])
    assert engine.reserve("b", 5) is None, "what was handed over and not fetched must not be evicted"
    engine.store.claim("a")
    assert len(engine.reserve("b", 5)) == 5


def test_what_is_there_needs_no_bytes_and_is_kept_for_both(engine):
    engine.commit(engine.reserve("a", 4))
    engine.store.claim("a")
    again = engine.store.reserve("c", 0, 1, [*keys("a", 4), *keys("c", 2)], [256] * 6)
    assert [place.ticket is None for place in again] == [True] * 4 + [False] * 2
    assert engine.reserve("b", 3) is None
    engine.commit(again)
    engine.store.claim("c")
    assert engine.clean()


def test_all_or_none_and_nobody_is_evicted_in_vain(engine):
    engine.commit(engine.reserve("a", 4))
    engine.store.claim("a")
    held = engine.reserve("b", 3)
    assert engine.reserve("c", 6) is None
    assert engine.directory.match(keys("a", 4)) == 4 and engine.directory.evicted == 0
    engine.commit(held)
    engine.store.claim("b")


def test_many_holds_of_one_chunk_do_not_make_the_pool_look_full(engine):
    engine.commit(engine.reserve("a", 2))
    for i in range(10):
        assert engine.store.reserve(f"r{i}", 0, 1, keys("a", 2), [256] * 2) is not None
    assert engine.directory.leases > engine.directory.capacity
    assert len(engine.reserve("b", 6)) == 6 and engine.reserve("c", 1) is None


def test_a_key_that_somebody_writes_is_waited_for(engine):
    first = engine.reserve("a", 2)
    assert engine.reserve("a", 2, req_id="other") is None
    engine.commit(first)
    assert [place.ticket for place in engine.reserve("a", 2, req_id="other")] == [None, None]


def test_an_abandoned_slot_stays_taken_until_it_is_given_back(engine):
    (place,) = engine.reserve("a", 1)
    engine.store.abandon(place.ticket)
    assert engine.directory.used == 1
    (anew,) = engine.reserve("a", 1, req_id="again")
    assert anew.slot != place.slot
    engine.store.give_back(place.ticket)
    engine.store.give_back(anew.ticket)
    assert engine.directory.used == 0 and engine.clean()


def test_nobody_came_for_it():
    engine = Engine(8, ttl_s=0.05)
    engine.commit(engine.reserve("a", 4))
    assert engine.reserve("b", 8) is None
    time.sleep(0.06)
    engine.store.expire()
    assert engine.store.unclaimed == 1 and engine.clean() and len(engine.reserve("b", 8)) == 8


def test_keys_that_are_named_twice_leave_nothing(engine):
    twice = keys("a", 2) * 2
    assert engine.store.reserve("a", 0, 1, twice, [256] * 4) is None
    assert engine.directory.used == 0


def test_a_chunk_is_seen_when_every_rank_wrote_it():
    engine = Engine(8, writers=2)
    first, second = engine.reserve("a", 2), engine.reserve("a", 2, writer=1)
    assert [p.slot for p in first] == [p.slot for p in second]
    engine.commit(first)
    assert engine.directory.match(keys("a", 2)) == 0
    engine.commit(second)
    assert engine.directory.match(keys("a", 2)) == 2
    engine.store.claim("a")
    assert engine.clean()


def test_one_ranks_failure_fails_the_chunk_and_the_slot_waits_for_both():
    engine = Engine(8, writers=2)
    (mine,), (theirs,) = engine.reserve("a", 1), engine.reserve("a", 1, writer=1)
    engine.store.abandon(mine.ticket)
    engine.store.commit(theirs.ticket)
    assert engine.directory.match(keys("a", 1)) == 0 and engine.directory.used == 1
    engine.store.give_back(mine.ticket)
    assert engine.directory.used == 0 and engine.clean()


def test_a_rank_that_never_comes_costs_the_others_their_wait_and_no_slot():
    engine = Engine(8, writers=2, ttl_s=0.05)
    engine.commit(engine.reserve("a", 3))
    time.sleep(0.06)
    engine.store.expire()
    assert engine.directory.used == 0 and engine.clean()
    assert engine.reserve("a", 3, writer=1) is not None, "it is the first of another try"
