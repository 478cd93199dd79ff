"""Header, index and breaker, each alone."""

from __future__ import annotations

import logging
from random import Random

import pytest

from lmcache_ext.policies import POLICIES
from lmcache_ext.policies.lru import LRU
from lmcache_ext.tiers import Outcome
from lmcache_ext.tiers.breaker import Breaker
from lmcache_ext.tiers.header import BLOCK, MAX_PARTS, Header, decode, digest, encode, examine
from lmcache_ext.tiers.index import Grant, Index
from tests.tiers.helpers import chunk, header_of, key, memory

# -- header -----------------------------------------------------------------------------------------------------------


def test_a_header_says_what_it_was_told() -> None:
    parts = chunk(1, 10, 0, 4096)
    block = header_of(key(7), parts, expires=1234.5)
    assert decode(block) == Header(key(7), (10, 0, 4096), 1234.5, digest(parts))
    assert isinstance(examine(block, BLOCK + 4106, key(7), [10, 0, 4096], now=1234.0), Header)
    assert examine(block, BLOCK + 4106, key(7), [10, 0, 4096], now=1234.5) is Outcome.EXPIRED
    assert examine(block, BLOCK + 4106, key(8), [10, 0, 4096], now=0) is Outcome.FOREIGN
    assert examine(block, BLOCK + 4106, key(7), [10, 4096], now=0) is Outcome.FOREIGN
    assert examine(block, BLOCK + 4105, key(7), [10, 0, 4096], now=0) is Outcome.CORRUPT


def test_every_bit_of_a_header_matters() -> None:
    block = bytes(header_of(key(7), chunk(1, 8, 8)))
    used = 80 + 2 * 8 + 8
    for at in range(used):
        for bit in range(8):
            changed = bytearray(block)
            changed[at] ^= 1 << bit
            assert isinstance(decode(changed), Outcome), f"byte {at}, bit {bit}"
    assert not any(block[used:])


def test_what_is_no_header_is_corrupt() -> None:
    assert decode(bytes(BLOCK)) is Outcome.CORRUPT
    assert decode(b"short") is Outcome.CORRUPT
    assert decode(Random(0).randbytes(BLOCK)) is Outcome.CORRUPT


def test_a_header_holds_as_many_parts_as_it_says() -> None:
    (block,) = memory(BLOCK)
    encode(block, key(1), [memoryview(b"")] * MAX_PARTS)
    assert isinstance(decode(block), Header)
    with pytest.raises(ValueError, match="parts"):
        encode(block, key(1), [memoryview(b"")] * (MAX_PARTS + 1))


def test_the_format_has_not_changed() -> None:
    """Objects on users' disks were written with it: raise the schema instead."""
    block = bytes(header_of(bytes(range(32)), [memoryview(b"abc"), memoryview(b"")], expires=1.0))
    fixed = "4c4d4358544945520100010002000000" + "0300000000000000e803000000000000" + bytes(range(32)).hex()
    assert block[:64].hex() == fixed
    assert block[64:80].hex() == "06b05ab6733a618578af5f94892f3950"  # xxh3-128 of b"abc"
    assert block[80:96].hex() == "0300000000000000" + "0000000000000000"


# -- index ------------------------------------------------------------------------------------------------------------


def put(index: Index, i: int, size: int = 10) -> None:
    grant = index.reserve(key(i), size, 0, 0)
    assert isinstance(grant, Grant)
    for victim in list(grant.victims):
        index.gone(victim, grant)
    index.commit(key(i))


def test_what_is_being_written_or_removed_is_not_found() -> None:
    index = Index(LRU(), 100)
    grant = index.reserve(key(1), 10, 0, 0)
    assert isinstance(grant, Grant) and index.find([key(1)], 0) == [Outcome.MISS]
    assert index.reserve(key(1), 10, 0, 0) is Outcome.REFUSED
    index.commit(key(1))
    assert index.find([key(1), key(2)], 0) == [Outcome.OK, None]
    assert index.leave(key(1)) is True and index.leave(key(1)) is False and index.leave(key(2)) is None
    assert index.find([key(1)], 0) == [Outcome.MISS] and index.used == 10
    index.gone(key(1))
    assert index.used == 0 and index.check() == []


def test_what_is_read_is_not_evicted_and_leaves_with_its_last_reader() -> None:
    index = Index(LRU(), 20)
    put(index, 1), put(index, 2)
    assert index.pin(key(1), 0) is Outcome.OK and index.pin(key(1), 0) is Outcome.OK
    grant = index.reserve(key(3), 10, 0, 0)
    assert isinstance(grant, Grant) and grant.victims == [key(2)]
    assert index.reserve(key(4), 10, 0, 0) is Outcome.FULL
    assert index.leave(key(1)) is False and index.find([key(1)], 0) == [Outcome.MISS]
    assert index.unpin(key(1)) is False and index.unpin(key(1)) is True
    index.gone(key(1))
    index.abort(grant)
    assert index.used == 10 and index.claim_stuck() == [key(2)], "the victim was not removed: its bytes count"


def test_room_that_a_victim_leaves_is_its_successors_alone() -> None:
    """Between the victim's end and the write, nobody else may take the room."""
    index = Index(LRU(), 30)
    for i in (1, 2, 3):
        put(index, i)
    grant = index.reserve(key(4), 10, 0, 0)
    assert isinstance(grant, Grant) and grant.victims == [key(1)]
    index.gone(key(1), grant)
    other = index.reserve(key(5), 10, 0, 0)
    assert isinstance(other, Grant) and other.victims == [key(2)]


def test_a_key_deleted_while_it_is_written_goes_when_it_is_complete() -> None:
    index = Index(LRU(), 30)
    index.reserve(key(1), 10, 0, 0)
    assert index.leave(key(1)) is False
    assert index.commit(key(1)) is True and index.find([key(1)], 0) == [Outcome.MISS]
    index.gone(key(1))
    assert index.used == 0 and index.check() == []


def test_what_a_scan_finds_is_evicted_by_age_and_what_was_used_meanwhile_last() -> None:
    index = Index(LRU(), 60)
    index.begin_scan()
    for i, when in ((1, 30.0), (2, 10.0), (3, 20.0), (4, 5.0), (5, 40.0)):
        assert index.adopt(key(i), 10, when, 0)
    assert index.pin(key(4), 0) is Outcome.OK
    index.unpin(key(4))
    assert index.leave(key(5)) is True
    index.gone(key(5))
    assert index.check() == []
    index.settle()
    assert list(index._policy.victims()) == [key(2), key(3), key(1), key(4)]
    assert index.check() == []


def test_uses_while_a_scan_runs_are_remembered_once_for_each_object() -> None:
    """A bucket that may be read and not listed is scanned for ever."""
    index = Index(LRU(), None)
    index.begin_scan()
    for i in (1, 2, 3):
        index.adopt(key(i), 10, float(i), 0)
    for _ in range(1000):
        for i in (3, 1):
            assert index.pin(key(i), 0) is Outcome.OK
            index.unpin(key(i))
    assert list(index._touched) == [key(3), key(1)]
    index.find([key(3)], 0, touch=True)
    assert index.leave(key(1)) is True and list(index._touched) == [key(3)]
    index.gone(key(1))
    assert index.check() == []
    index.settle()
    assert list(index._policy.victims()) == [key(2), key(3)] and not index._touched
    assert index.check() == []


def test_more_than_may_be_there_leaves() -> None:
    index = Index(LRU(), 25)
    for i in range(5):
        index.adopt(key(i), 10, 0, 0)
    assert index.used == 50
    surplus = index.surplus()
    assert surplus == [key(0), key(1), key(2)] and index.surplus() == []
    for k in surplus:
        index.gone(k)
    assert index.used == 20 and index.check() == []


@pytest.mark.parametrize("policy", list(POLICIES))
def test_random_traffic_keeps_every_invariant(policy: str) -> None:
    """Against what would lie on a disk: `there` is written late and removed early, as a runner does."""
    rng = Random(policy)
    index = Index(POLICIES.get(policy)(), 100)
    there: dict[bytes, int] = {}
    grants: list[tuple[Grant, int]] = []
    leaving: list[bytes] = []
    pinned: list[bytes] = []
    for _ in range(4000):
        k, roll = key(rng.randrange(15)), rng.random()
        if roll < 0.3:
            size = rng.randrange(5, 40)
            if isinstance(grant := index.reserve(k, size, 0, 0), Grant):
                grants.append((grant, size))
        elif roll < 0.6 and grants:
            grant, size = rng.choice(grants)
            if grant.victims and rng.random() < 0.9:
                victim = grant.victims[0]
                del there[victim]
                index.gone(victim, grant)
            elif grant.victims or rng.random() < 0.2:
                grants.remove((grant, size))
                index.abort(grant)
            else:
                grants.remove((grant, size))
                there[grant.key] = size
                if index.commit(grant.key):
                    leaving.append(grant.key)
        elif roll < 0.7:
            if index.leave(k):
                leaving.append(k)
        elif roll < 0.8 and leaving:
            gone = leaving.pop()
            if rng.random() < 0.8:
                del there[gone]
                index.gone(gone)
            else:
                index.stay(gone)
        elif roll < 0.82:
            leaving += index.claim_stuck()
        elif roll < 0.9:
            if index.pin(k, 0) is Outcome.OK:
                pinned.append(k)
        elif pinned and index.unpin(read := pinned.pop()):
            leaving.append(read)
        assert sum(there.values()) <= index.used <= 100
        assert index.check() == []
        assert all(k in there for k in index.ready())


# -- breaker ----------------------------------------------------------------------------------------------------------


def test_a_breaker_opens_probes_and_remembers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    breaker = Breaker("it", limit=3, cooldown=1, longest=3)
    for _ in range(2):
        breaker.fault(0, "x")
    breaker.success()
    for _ in range(2):
        breaker.fault(0, "x")
    assert breaker.closed
    breaker.fault(0, "x")
    assert not breaker.closed and not breaker.claim_probe(0.9)
    assert breaker.claim_probe(1.0) and not breaker.claim_probe(1.0), "two probes at once"
    breaker.probed(False, 1.0)
    assert not breaker.claim_probe(2.9) and breaker.claim_probe(3.0), "the cooldown did not double"
    breaker.probed(True, 3.0)
    assert breaker.closed
    breaker.fault(3.0, "x")
    assert not breaker.closed, "after a mere probe one fault is enough"
    assert not breaker.claim_probe(5.9) and breaker.claim_probe(6.0), "3 s, the longest cooldown"
    breaker.probed(True, 6.0)
    breaker.success()
    breaker.fault(6.0, "x")
    assert breaker.closed, "real work succeeded"
    assert len(caplog.records) == 4 and breaker.trips == 2
