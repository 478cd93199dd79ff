"""The directory over the arena: bounded, fair, and right after every step of random traffic."""

from __future__ import annotations

import os
import random
from unittest import mock

import pytest

from lmcache_ext.engine import Chunk, Outcome
from lmcache_ext.policies import POLICIES
from lmcache_ext.server.directory import SharedDirectory
from lmcache_ext.server.memory import MIB, Arena, Group, Segment, Stake, extent_for, parts_of
from tests.server.helpers import until

PAGE = 4096


def group(number: int, slot: int = PAGE) -> Group:
    return Group(number, bytes([number]) * 32, "m", (slot,), 16)


def key(of: Group, i: int) -> bytes:
    return bytes([of.number]) + i.to_bytes(31, "big")


def directory(extents: int, slots: int, policy: str = "LRU") -> SharedDirectory:
    """Extents of `slots` pages each."""
    return SharedDirectory(POLICIES.get(policy)(), Arena(extents * slots * PAGE, slots * PAGE))


def put(d: SharedDirectory, of: Group, *numbers: int, salt: bytes = b"") -> None:
    for i in numbers:
        chunk = d.prepare_store(key(of, i), 16, Stake(of, salt))
        assert isinstance(chunk, Chunk), (i, chunk)
        d.complete_store(chunk, True)


@pytest.mark.parametrize("policy", ["LRU", "ARC", "LFU", "S3-FIFO"])
def test_random_traffic_of_three_groups_keeps_every_invariant(policy):
    dice = random.Random(7)
    d = SharedDirectory(POLICIES.get(policy)(), Arena(16 * MIB, MIB // 2))
    groups = [group(i + 1, size) for i, size in enumerate((PAGE, 100_000, 300_000))]
    held: list[list[Chunk]] = []
    writing: list[Chunk] = []
    for step in range(6000):
        of, action = dice.choice(groups), dice.random()
        name = key(of, dice.randrange(300))
        if action < 0.4:
            made = d.prepare_store(name, 16, Stake(of, dice.choice([b"", b"a" * 16])))
            if isinstance(made, Chunk):
                writing.append(made)
        elif action < 0.65 and writing:
            d.complete_store(writing.pop(dice.randrange(len(writing))), dice.random() < 0.8)
        elif action < 0.75 and (chunks := d.lease([name])):
            held.append(chunks)
        elif action < 0.9 and held:
            d.release(held.pop(dice.randrange(len(held))))
        elif action < 0.95:
            d.drop(name)
        elif step % 500 == 0:
            d.forget(of)
        assert d.arena.used_bytes <= 16 * MIB
        if step % 50 == 0:
            assert not d.check()
    for chunks in held:
        d.release(chunks)
    for chunk in writing:
        d.complete_store(chunk, False)
    d.forget(None)
    assert not d.check()
    assert (d.arena.spare, d.arena.used_bytes, d.leases) == (len(d.arena.extents), 0, 0)


def test_extents_go_back_when_they_are_empty():
    d, one = directory(4, 4), group(1)
    put(d, one, *range(6))
    assert d.arena.spare == 2
    for i in range(4):
        d.drop(key(one, i))
    assert d.arena.spare == 3
    d.drop(key(one, 4))
    d.drop(key(one, 5))
    assert d.arena.spare == 4


def test_a_newcomer_gets_the_extent_that_is_the_coldest_and_only_that():
    d, old, new = directory(3, 4), group(1), group(2)
    put(d, old, *range(12))
    d.touch([key(old, i) for i in range(4)])  # the first extent is warm again
    put(d, new, 0)
    assert [d.ready(key(old, i)) is not None for i in range(12)] == [True] * 4 + [False] * 4 + [True] * 4
    put(d, new, 1, 2, 3)
    assert len(d) == 12


def test_whoever_has_the_oldest_chunk_gives_way_and_that_may_be_oneself():
    d, one, two = directory(2, 4), group(1), group(2)
    put(d, one, *range(4))
    put(d, two, *range(4))
    put(d, one, 4)  # the oldest is its own
    assert d.ready(key(one, 0)) is None
    assert all(d.ready(key(two, i)) for i in range(4))


def test_what_is_held_stays_and_an_extent_with_it():
    d, one, two = directory(2, 2), group(1), group(2)
    put(d, one, *range(4))
    held = d.lease([key(one, 0), key(one, 2)])
    assert d.prepare_store(key(two, 0), 16, Stake(two)) is Outcome.FULL
    assert held is not None
    d.release(held[:1])
    assert isinstance(d.prepare_store(key(two, 0), 16, Stake(two)), Chunk)
    assert d.ready(key(one, 2)) is held[1]


def test_who_finds_no_room_does_not_search_for_each_chunk():
    d, one, two = directory(64, 500), group(1), group(2)
    put(d, one, *range(32_000))
    held = d.lease([key(one, i) for i in range(0, 32_000, 500)])  # one of each extent
    assert held is not None
    with mock.patch.object(d, "_seek", wraps=d._seek) as seek:
        for i in range(64):
            assert d.prepare_store(key(two, i), 16, Stake(two)) is Outcome.FULL
        assert 1 <= seek.call_count < 10  # each goes over all chunks, and keeps everybody else waiting
        d.release(held)
        assert until(lambda: isinstance(d.prepare_store(key(two, 0), 16, Stake(two)), Chunk))


def test_a_salt_at_its_bound_whose_chunks_are_held_does_not_search_for_each_chunk():
    d, one, salt = directory(64, 500), group(1), b"s" * 16
    put(d, one, *range(20_000))
    d.limit(salt, 1000 * PAGE)
    put(d, one, *range(20_000, 21_000), salt=salt)
    held = d.lease([key(one, i) for i in range(20_000, 21_000)])
    with mock.patch.object(d, "_shrink", wraps=d._shrink) as shrink:
        for i in range(21_000, 21_064):
            assert d.prepare_store(key(one, i), 16, Stake(one, salt)) is Outcome.FULL
        assert 1 <= shrink.call_count < 10
        d.release(held)
        assert until(lambda: isinstance(d.prepare_store(key(one, 21_000), 16, Stake(one, salt)), Chunk))
        searched = shrink.call_count
        put(d, one, *range(21_001, 21_050), salt=salt)
        assert shrink.call_count == searched, "one search makes room for many"
    assert d.arena.by_salt[salt] <= 1000 * PAGE and d.check() == []


def test_what_is_held_is_passed_over_within_one_group():
    d, one = directory(2, 2), group(1)
    put(d, one, *range(4))
    held = d.lease([key(one, 1)])
    d.touch([key(one, i) for i in (2, 3, 0)])
    put(d, one, 4)
    assert held is not None
    assert d.ready(key(one, 1)) is held[0]
    assert d.ready(key(one, 2)) is None


def test_a_salt_is_bounded_at_every_moment_and_evicts_its_own():
    d, one, salt = directory(4, 4), group(1), b"s" * 16
    put(d, one, 100, 101)
    d.limit(salt, 3 * PAGE)
    for i in range(8):
        put(d, one, i, salt=salt)
        assert d.arena.by_salt[salt] <= 3 * PAGE
    assert [d.ready(key(one, i)) is not None for i in range(8)] == [False] * 5 + [True] * 3
    assert d.ready(key(one, 100))
    held = d.lease([key(one, i) for i in (5, 6, 7)])
    assert d.prepare_store(key(one, 9), 16, Stake(one, salt)) is Outcome.FULL
    assert d.over(Stake(one, salt))
    assert not d.over(Stake(one))
    assert held is not None
    d.release(held)
    d.limit(salt, PAGE)
    assert d.arena.by_salt[salt] == PAGE
    d.limit(salt, 0)
    assert salt not in d.arena.by_salt
    d.limit(salt, None)
    put(d, one, *range(20, 26), salt=salt)
    assert not d.check()


def test_check_finds_what_is_wrong():
    d, one = directory(2, 4), group(1)
    put(d, one, 0, 1)
    d.arena.extents[0].used += 1
    d.arena.by_salt[b"x"] = 5
    faults = "\n".join(d.check())
    assert "extent 0 counts 3 slots and has 2" in faults
    assert "are counted" in faults


def test_parts_lie_on_pages_and_a_partial_chunk_has_less():
    segment = Segment(MIB, "test")
    try:
        of = Group(1, bytes(32), "m", (5000, 8192), 16)
        assert (of.starts, of.slot_bytes) == ((0, 8192), 16384)
        assert [part.nbytes for part in parts_of(segment, Stake(of), 16384, 8)] == [2500, 4096]
        parts_of(segment, Stake(of), 16384, 16)[1][:4] = b"abcd"
        assert os.pread(segment.fd, 4, 16384 + 8192) == b"abcd"
        assert segment.resident <= 2 * PAGE
        while segment.populate():
            pass
        assert segment.resident == MIB
    finally:
        segment.close()


def test_extents_fit_the_memory():
    assert extent_for(32 << 30) == 512 * MIB
    assert extent_for(8 << 30) == 256 * MIB
    assert extent_for(64 * MIB) == 8 * MIB
