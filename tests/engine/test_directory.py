"""The directory: nothing is visible before its bytes are complete, nothing is reused while it is held."""

from __future__ import annotations

import random

import pytest

from lmcache_ext.engine import Chunk, Directory, Outcome
from lmcache_ext.policies.lru import LRU


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


class Ear:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []

    def stored(self, chunk: Chunk) -> None:
        self.heard.append(("stored", chunk.key))

    def removed(self, chunk: Chunk) -> None:
        self.heard.append(("removed", chunk.key))


def directory(slots: int, ear: Ear | None = None) -> Directory:
    made = Directory(LRU(), ear)
    made.grow(slots)
    return made


def store(d: Directory, i: int) -> Chunk:
    chunk = d.prepare_store(key(i), 256)
    assert isinstance(chunk, Chunk)
    d.complete_store(chunk, True)
    return chunk


def test_reserved_chunks_are_invisible() -> None:
    d = directory(4)
    chunk = d.prepare_store(key(1), 256)
    assert isinstance(chunk, Chunk)
    assert d.match([key(1)]) == 0 and d.ready(key(1)) is None and d.lease([key(1)]) is None
    d.complete_store(chunk, True)
    assert d.match([key(1), key(2)]) == 1
    assert d.check() == []


def test_failed_store_leaves_no_trace() -> None:
    ear = Ear()
    d = directory(1, ear)
    chunk = d.prepare_store(key(1), 256)
    assert isinstance(chunk, Chunk)
    d.complete_store(chunk, False)
    assert (d.used, d.match([key(1)]), ear.heard, d.check()) == (0, 0, [], [])


def test_second_writer_is_told_that_it_exists() -> None:
    d = directory(4)
    d.prepare_store(key(1), 256)
    assert d.prepare_store(key(1), 256) is Outcome.EXISTS
    store(d, 2)
    assert d.prepare_store(key(2), 256) is Outcome.EXISTS


def test_least_recently_used_leaves_first() -> None:
    d = directory(3)
    for i in (1, 2, 3):
        store(d, i)
    d.touch([key(1)])
    store(d, 4)
    assert [d.match([key(i)]) for i in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert d.evicted == 1


def test_leased_chunks_are_never_evicted() -> None:
    d = directory(2)
    store(d, 1), store(d, 2)
    held = d.lease([key(1), key(2)])
    assert held is not None
    assert d.prepare_store(key(3), 256) is Outcome.FULL
    d.release(held)
    assert isinstance(d.prepare_store(key(3), 256), Chunk)


def test_lease_is_all_or_nothing() -> None:
    d = directory(2)
    store(d, 1)
    assert d.lease([key(1), key(2)]) is None
    assert d.leases == 0


def test_dropped_chunk_keeps_its_slot_until_the_last_reader_is_done() -> None:
    ear = Ear()
    d = directory(1, ear)
    store(d, 1)
    held = d.lease([key(1)])
    assert held is not None
    d.drop(key(1))
    assert d.match([key(1)]) == 0
    assert d.prepare_store(key(2), 256) is Outcome.FULL
    d.release(held)
    assert isinstance(d.prepare_store(key(2), 256), Chunk)
    assert ear.heard == [("stored", key(1)), ("removed", key(1))]
    assert d.check() == []


def test_abandoned_store_never_becomes_visible_and_keeps_its_slot_while_it_may_write() -> None:
    d = directory(1)
    chunk = d.prepare_store(key(1), 256)
    assert isinstance(chunk, Chunk)
    d.abandon(chunk)
    assert d.prepare_store(key(2), 256) is Outcome.FULL
    d.complete_store(chunk, True)
    assert d.match([key(1)]) == 0
    assert isinstance(d.prepare_store(key(2), 256), Chunk)
    assert d.check() == []


def test_clear_forgets_also_what_is_being_written() -> None:
    d = directory(4)
    store(d, 1)
    writing = d.prepare_store(key(2), 256)
    assert isinstance(writing, Chunk)
    assert d.clear() == 1
    d.complete_store(writing, True)
    assert (len(d), d.used, d.check()) == (0, 0, [])


def test_version_changes_whenever_a_lookup_may() -> None:
    d = directory(2)
    seen = {d.version}
    for change in (lambda: store(d, 1), lambda: store(d, 2), lambda: store(d, 3), lambda: d.drop(key(3)), d.clear):
        change()
        assert d.version not in seen
        seen.add(d.version)


def test_check_finds_and_mends_a_lost_slot() -> None:
    d = directory(2)
    d._slots.take()
    assert len(d.check(fix=True)) == 1
    assert d.check() == []


def test_check_finds_a_wrong_lease_count_and_a_wrong_policy() -> None:
    d = directory(2)
    store(d, 1)
    d.leases += 1
    d._policy.remove(key(1))
    assert len(d.check()) == 2


@pytest.mark.parametrize("seed", range(5))
def test_random_traffic_keeps_every_invariant(seed: int) -> None:
    rng = random.Random(seed)
    d = directory(8)
    writing: list[Chunk] = []
    reading: list[list[Chunk]] = []
    for _ in range(3000):
        roll = rng.random()
        if roll < 0.4:
            made = d.prepare_store(key(rng.randrange(20)), 256)
            if isinstance(made, Chunk):
                writing.append(made)
        elif roll < 0.6 and writing:
            d.complete_store(writing.pop(rng.randrange(len(writing))), rng.random() < 0.8)
        elif roll < 0.75:
            held = d.lease([key(rng.randrange(20))])
            if held:
                reading.append(held)
        elif roll < 0.9 and reading:
            d.release(reading.pop(rng.randrange(len(reading))))
        elif roll < 0.95:
            d.drop(key(rng.randrange(20)))
        elif roll < 0.97 and writing:
            d.abandon(rng.choice(writing))
        elif roll < 0.975:
            d.clear()
        slots = [c.slot for c in writing] + [c.slot for held in reading for c in held]
        ready = {c.slot for c in d.chunks()}
        assert not ready & {c.slot for c in writing}, "a slot is written and readable at once"
        assert d.used <= 8 and len(set(slots)) <= 8
        assert d.check() == []
