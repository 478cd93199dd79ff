"""Every policy keeps the contract of `policies/base.py`."""

from __future__ import annotations

import random

import pytest

from lmcache_ext.policies import POLICIES, EvictionPolicy


@pytest.fixture(params=list(POLICIES))
def policy(request: pytest.FixtureRequest) -> EvictionPolicy:
    return POLICIES.get(request.param)()


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
    assert sorted(policy.victims()) == sorted(known)


def test_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="LRU"):
        POLICIES.get("BEST")
    assert "lru" in POLICIES


def test_lru_order() -> None:
    lru = POLICIES.get("lru")()
    for key in (b"a", b"b", b"c"):
        lru.insert(key)
    lru.touch(b"a")
    assert list(lru.victims()) == [b"b", b"c", b"a"]
