"""Least recently used."""

from __future__ import annotations

from lmcache_ext.policies.base import POLICIES
from lmcache_ext.policies.fifo import FIFO


@POLICIES.register("LRU")
class LRU(FIFO):
    """The key unused for longest leaves first: a queue in which a use begins anew."""

    def touch(self, key: bytes) -> None:
        self._order.move_to_end(key)
