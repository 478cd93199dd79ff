"""Every policy does what its plain reference does, in traffic like the directory's and in none like it."""

from __future__ import annotations

import random

import pytest

from lmcache_ext.policies import POLICIES
from tests.policies.reference import REFERENCES


def test_every_policy_has_a_reference() -> None:
    assert list(REFERENCES) == list(POLICIES)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", REFERENCES)
def test_random_calls(name: str, seed: int) -> None:
    rng = random.Random(seed)
    policy, reference = POLICIES.get(name)(), REFERENCES[name]()
    known: set[bytes] = set()
    size, names = rng.choice([(1, 3), (5, 12), (12, 30), (40, 60)])
    for _ in range(4000):
        key = bytes([int(names * rng.random() ** 2)])
        if key not in known:
            if len(known) >= size:
                offered = list(policy.victims())
                assert offered == reference.victims()
                victim = offered[0] if rng.random() < 0.8 else rng.choice(offered)  # those before it are leased
                policy.remove(victim), reference.remove(victim)
                known.remove(victim)
            policy.insert(key), reference.insert(key)
            known.add(key)
        elif rng.random() < 0.9:
            policy.touch(key), reference.touch(key)
        else:  # dropped
            policy.remove(key), reference.remove(key)
            known.remove(key)
        if rng.random() < 0.002:  # a reset of the cache
            for key in sorted(known):
                policy.remove(key), reference.remove(key)
            known.clear()
        if rng.random() < 0.1:
            assert list(policy.victims()) == reference.victims()
    assert sorted(policy.victims()) == sorted(known) and len(policy) == len(known)
