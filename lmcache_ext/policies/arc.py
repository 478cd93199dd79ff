"""Adaptive replacement: recency and frequency share the pool, and misses say how."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from lmcache_ext.policies.base import POLICIES, EvictionPolicy


@POLICIES.register("ARC")
class ARC(EvictionPolicy):
    """Two LRU lists: keys of one request, keys that came again. Ghosts of either list tell which should be longer.

    After Megiddo and Modha (FAST 2003). What differs: the capacity is learnt, as the most keys known at once; a victim
    is named before the newcomer is known, so that ghosts count when the newcomer is ready; the first touch after
    `insert` promotes nobody (see the contract).
    """

    def __init__(self) -> None:
        self._once: OrderedDict[bytes, bool] = OrderedDict()  # T1, longest unused first; whether touched yet
        self._again: OrderedDict[bytes, None] = OrderedDict()  # T2
        self._once_ghosts: OrderedDict[bytes, None] = OrderedDict()  # B1: |T1| + |B1| <= capacity
        self._again_ghosts: OrderedDict[bytes, None] = OrderedDict()  # B2: all four <= 2 * capacity
        self._target = 0.0  # how long T1 should be, in [0, capacity]
        self._capacity = 0

    def insert(self, key: bytes) -> None:
        once, again = self._once_ghosts, self._again_ghosts
        if key in once:
            self._target = min(self._target + max(1.0, len(again) / len(once)), self._capacity)
            del once[key]
            self._again[key] = None
        elif key in again:
            self._target = max(self._target - max(1.0, len(once) / len(again)), 0.0)
            del again[key]
            self._again[key] = None
        else:
            self._once[key] = False
        self._trim()

    def touch(self, key: bytes) -> None:
        if key in self._again:
            self._again.move_to_end(key)
        elif self._once[key]:
            del self._once[key]
            self._again[key] = None
        else:
            self._once[key] = True
            self._once.move_to_end(key)

    def remove(self, key: bytes) -> None:
        if key in self._once:
            del self._once[key]
            self._once_ghosts[key] = None
        else:
            del self._again[key]
            self._again_ghosts[key] = None
        self._trim()

    def victims(self) -> Iterator[bytes]:
        if len(self._once) > self._target:
            return chain(self._once, self._again)
        return chain(self._again, self._once)

    def __len__(self) -> int:
        return len(self._once) + len(self._again)

    def _trim(self) -> None:
        once, again, ghosts = len(self._once), len(self._again), len(self._once_ghosts)
        if once + again > self._capacity:
            self._capacity = once + again
        while ghosts and once + ghosts > self._capacity:
            self._once_ghosts.popitem(last=False)
            ghosts -= 1
        while once + again + ghosts + len(self._again_ghosts) > 2 * self._capacity:
            self._again_ghosts.popitem(last=False)
