"""Every policy keeps the contract of `policies/base.py`."""

from __future__ import annotations

import random
import time

import pytest

from lmcache_ext.config import load_config
from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.errors import ConfigError
from lmcache_ext.policies import POLICIES, EvictionPolicy

TAIL_FIRST = {"ARC", "LFU", "LRU", "MRU"}  # the others keep to the order of arrival, which is head first


@pytest.fixture(params=list(POLICIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy(name: str) -> EvictionPolicy:
    return POLICIES.get(name)()


def keys(count: int, start: int = 0) -> list[bytes]:
    return [i.to_bytes(4, "little") for i in range(start, start + count)]


def held(policy: EvictionPolicy) -> int:
    """How many entries all containers of `policy` have."""
    containers = [value for value in vars(policy).values() if hasattr(value, "__len__")]
    inner = [v for c in containers if isinstance(c, dict) for v in c.values() if isinstance(v, dict)]
    return sum(map(len, containers + inner))


def request(directory: Directory, chain: list[bytes]) -> int:
    """Find what is there, store the rest, end. Returns how many chunks were found."""
    found = directory.match(chain)
    leased = directory.lease(chain[:found])
    assert leased is not None
    made = [chunk for key in chain if isinstance(chunk := directory.prepare_store(key, 256), Chunk)]
    for chunk in made:
        directory.complete_store(chunk, True)
    directory.release(leased)
    directory.touch(reversed(chain))
    return found


def test_victims_are_exactly_the_known_keys(policy: EvictionPolicy) -> None:
    rng = random.Random(0)
    known: set[bytes] = set()
    for _ in range(2000):
        key = bytes([rng.randrange(50)])
        if key not in known:
            policy.insert(key)
            known.add(key)
        elif rng.random() < 0.5:
            policy.touch(key)
        else:
            policy.remove(key)
            known.remove(key)
        assert len(policy) == len(known)
        if rng.random() < 0.1:
            assert sorted(policy.victims()) == sorted(known)


def test_an_empty_policy_offers_nobody(policy: EvictionPolicy) -> None:
    assert list(policy.victims()) == []
    policy.insert(b"a")
    policy.remove(b"a")
    assert (list(policy.victims()), len(policy)) == ([], 0)


def test_asking_twice_gives_the_same_answer(policy: EvictionPolicy) -> None:
    rng = random.Random(1)
    for key in keys(20):
        policy.insert(key)
    for _ in range(200):
        policy.touch(rng.choice(keys(20)))
        offered = list(policy.victims())
        assert next(iter(policy.victims())) == offered[0]
        assert list(policy.victims()) == offered


def test_any_offered_key_may_be_refused_or_taken(policy: EvictionPolicy) -> None:
    rng = random.Random(2)
    known = set(keys(30))
    for key in keys(30):
        policy.insert(key)
        policy.touch(key)
    while known:
        for _ in range(3):
            policy.touch(rng.choice(sorted(known)))
        refused = set(rng.sample(sorted(known), len(known) // 2))
        victim = next(key for key in policy.victims() if key not in refused)
        policy.remove(victim)
        known.remove(victim)
    assert list(policy.victims()) == []


def test_a_key_that_left_is_a_newcomer(policy: EvictionPolicy) -> None:
    for _ in range(5):
        for key in keys(4):
            policy.insert(key)
            policy.touch(key)
        for key in list(policy.victims()):
            policy.remove(key)
    assert len(policy) == 0


def test_memory_and_time_are_bounded_over_a_million_operations(policy: EvictionPolicy) -> None:
    size, rng = 1000, random.Random(3)
    picks = [int(20_000 * rng.random() ** 3).to_bytes(4, "little") for _ in range(100_000)]
    known: set[bytes] = set()
    operations, i, most = 0, 0, 0
    began = time.thread_time()
    while operations < 1_000_000:
        key = picks[i % len(picks)] if i % 4 else (20_000 + i).to_bytes(4, "little")  # one in four is never seen again
        i += 1
        if key not in known:
            if len(known) == size:
                victim = next(iter(policy.victims()))
                policy.remove(victim)
                known.remove(victim)
                operations += 2
            policy.insert(key)
            known.add(key)
        else:
            policy.touch(key)
            policy.touch(key)
        policy.touch(key)
        operations += 2
        if i % 10_000 == 0:
            most = max(most, held(policy))
    assert time.thread_time() - began < 15, "of CPU; a second or two where nothing else runs"
    assert most <= 4 * size


def test_leased_chunks_stay_and_every_invariant_holds(policy: EvictionPolicy) -> None:
    rng = random.Random(4)
    directory = Directory(policy)
    directory.grow(12)
    reading: list[list[Chunk]] = []
    for _ in range(3000):
        start, length = rng.randrange(10) * 10, rng.randrange(1, 6)
        chain = keys(length, start)
        request(directory, chain)
        if rng.random() < 0.3 and (leased := directory.lease(chain)) is not None:
            reading.append(leased)
        if reading and rng.random() < 0.35:
            directory.release(reading.pop(rng.randrange(len(reading))))
        if rng.random() < 0.05:
            directory.drop(rng.choice(chain))
        if rng.random() < 0.01:
            directory.clear()
            while reading:
                directory.release(reading.pop())
        assert all(directory.ready(c.key) is c for leased in reading for c in leased if c.state.value == "ready")
        assert directory.check() == []


def test_a_pool_that_is_all_leased_gives_nothing_up(policy: EvictionPolicy) -> None:
    directory = Directory(policy)
    directory.grow(8)
    request(directory, keys(8))
    leased = directory.lease(keys(8))
    assert leased is not None
    assert request(directory, keys(2, start=100)) == 0
    assert directory.match(keys(8)) == 8
    directory.release(leased)
    request(directory, keys(2, start=100))
    assert directory.match(keys(2, start=100)) == 2


def test_which_end_of_a_chain_leaves_first(name: str, policy: EvictionPolicy) -> None:
    directory = Directory(policy)
    directory.grow(8)
    request(directory, keys(6))
    request(directory, keys(4, start=100))  # takes two of the six
    kept = [directory.ready(key) is not None for key in keys(6)]
    if name == "MRU":  # all but two of its own: it evicts the chain that it is storing only after the one before
        assert kept[:4] == [True] * 4
    elif name in TAIL_FIRST:
        assert kept == [True] * 4 + [False] * 2
    else:
        assert kept == [False] * 2 + [True] * 4


def test_the_writers_own_touch_is_no_reuse(name: str, policy: EvictionPolicy) -> None:
    """A chunk found once outlives many that were only stored, each touched by its own writer, where uses count."""
    directory = Directory(policy)
    directory.grow(20)
    request(directory, keys(2))
    request(directory, keys(2))
    for i in range(30):
        request(directory, keys(1, start=100 + i))
    assert directory.match(keys(2)) == (0 if name in {"LRU", "FIFO"} else 2)


def test_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="LRU"):
        POLICIES.get("BEST")
    assert "lru" in POLICIES


def test_the_setting_takes_every_policy_and_names_them_when_it_refuses(name: str) -> None:
    assert load_config({}, {"LMCACHE_CACHE_POLICY": name}).cache_policy == name
    assert load_config({"lmcache.cache_policy": name.lower()}, {}).cache_policy == name
    with pytest.raises(ConfigError) as refused:
        load_config({}, {"LMCACHE_CACHE_POLICY": "BEST"})
    assert "LMCACHE_CACHE_POLICY" in str(refused.value) and name in str(refused.value)


def test_the_choices_are_those_of_the_docs() -> None:
    assert list(POLICIES) == ["ARC", "FIFO", "LFU", "LRU", "MRU", "S3-FIFO"]
