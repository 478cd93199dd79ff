"""Least frequently used, with aging."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator

from lmcache_ext.policies.base import POLICIES, EvictionPolicy


@POLICIES.register("LFU")
class LFU(EvictionPolicy):
    """The key with the least uses leaves first; among equals, the one unused for longest.

    LFU with dynamic aging (Arlitt et al. 2000, "Evaluating content management techniques for Web proxy caches"): a
    key's rank is its uses plus the age at its last use, and the age is the rank of whoever left last. What was popular
    once is so overtaken by what is used now. One list for each rank; the age walks up over empty ranks, at most as
    many as the key that left had uses, which makes it O(1) a touch.
    """

    def __init__(self) -> None:
        # Rank → keys, longest unused first; none is empty.
        self._lists: defaultdict[int, OrderedDict[bytes, None]] = defaultdict(OrderedDict)
        self._keys: dict[bytes, tuple[int, int]] = {}  # rank, uses
        self._age = 0  # no rank is below

    def insert(self, key: bytes) -> None:
        self._enter(key, 1)

    def touch(self, key: bytes) -> None:
        self._enter(key, self._leave(key) + 1)

    def remove(self, key: bytes) -> None:
        self._leave(key)

    def victims(self) -> Iterator[bytes]:
        if not self._lists:
            return
        while self._age not in self._lists:
            self._age += 1
        yield from self._lists[self._age]
        for rank in sorted(self._lists)[1:]:
            yield from self._lists[rank]

    def __len__(self) -> int:
        return len(self._keys)

    def _enter(self, key: bytes, uses: int) -> None:
        rank = self._age + uses
        self._keys[key] = rank, uses
        self._lists[rank][key] = None

    def _leave(self, key: bytes) -> int:
        rank, uses = self._keys.pop(key)
        keys = self._lists[rank]
        del keys[key]
        if not keys:
            del self._lists[rank]
        return uses
