"""Most recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from lmcache_ext.policies.base import POLICIES, EvictionPolicy


@POLICIES.register("MRU")
class MRU(EvictionPolicy):
    """The request used last leaves first, from its chain's last chunk on.

    Taken one by one, the chunk touched last is the head of a chain, and without it the rest is worth nothing. So
    touches are kept until something else happens, or one of them comes again, and then count in reverse.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()
        self._run: dict[bytes, None] = {}  # touched since, each once; all in _order, too

    def insert(self, key: bytes) -> None:
        self._settle()
        self._order[key] = None

    def touch(self, key: bytes) -> None:
        if key in self._run:
            self._settle()
        self._run[key] = None

    def remove(self, key: bytes) -> None:
        self._settle()
        del self._order[key]

    def victims(self) -> Iterator[bytes]:
        self._settle()
        return reversed(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def _settle(self) -> None:
        for key in reversed(self._run):
            self._order.move_to_end(key)
        self._run.clear()
