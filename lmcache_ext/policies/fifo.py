"""First in, first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lmcache_ext.policies.base import POLICIES, EvictionPolicy


@POLICIES.register("FIFO")
class FIFO(EvictionPolicy):
    """The key that came first leaves first, used or not. Of a chain, that is its head."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes) -> None:
        self._order[key] = None

    def touch(self, key: bytes) -> None:
        pass

    def remove(self, key: bytes) -> None:
        del self._order[key]

    def victims(self) -> Iterator[bytes]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
