"""S3-FIFO: a small queue that most newcomers do not outlive, a main queue, and ghosts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from lmcache_ext.policies.base import POLICIES, EvictionPolicy

SMALL = 10  # the small queue is one part in SMALL of the pool
MOST = 3  # uses counted


@POLICIES.register("S3-FIFO")
class S3FIFO(EvictionPolicy):
    """Newcomers queue in a tenth of the pool; who is reused there, or asked for again soon after, joins the rest.

    After Yang et al. (SOSP 2023, "FIFO queues are all you need for cache eviction"). The main queue gives its head
    another round for each use counted. What differs: the capacity is learnt, as the most keys known at once, and
    queues are put in order when a victim is asked for, each step paid for by a touch.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[bytes, int] = OrderedDict()  # uses, at most MOST
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()  # left from _small; as many as _main may hold
        self._capacity = 0

    def insert(self, key: bytes) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0
        if (known := len(self._small) + len(self._main)) > self._capacity:
            self._capacity = known

    def touch(self, key: bytes) -> None:
        queue = self._small if key in self._small else self._main
        if (uses := queue[key]) < MOST:
            queue[key] = uses + 1

    def remove(self, key: bytes) -> None:
        if self._main.pop(key, None) is not None:
            return
        del self._small[key]
        self._ghosts[key] = None
        if len(self._ghosts) > self._capacity - self._capacity // SMALL:
            self._ghosts.popitem(last=False)

    def victims(self) -> Iterator[bytes]:
        small, main = self._small, self._main
        while small or main:
            if not main or len(small) * SMALL >= self._capacity:
                key, uses = next(iter(small.items()))
                if uses < 2:  # the first touch may be its writer's
                    return chain(small, main)
                del small[key]
                main[key] = 0
            else:
                key, uses = next(iter(main.items()))
                if not uses:
                    return chain(main, small)
                main[key] = uses - 1
                main.move_to_end(key)
        return iter(())

    def __len__(self) -> int:
        return len(self._small) + len(self._main)
