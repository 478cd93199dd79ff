"""What left a server's memory, for engines that have told routers of it."""

from __future__ import annotations

import itertools
from collections import deque

from lmcache_ext.engine import Chunk
from lmcache_ext.server.directory import group_of
from lmcache_ext.server.memory import Group

KEPT = 1 << 16


class Journal:
    """A directory's listener. Bounded: of the last departures only."""

    def __init__(self, kept: int = KEPT) -> None:
        self._left: deque[tuple[Group, bytes]] = deque(maxlen=kept)
        self.count = 0  # since the start

    def stored(self, chunk: Chunk) -> None:
        """Whoever stored it knows."""

    def removed(self, chunk: Chunk) -> None:
        """It can't be found any more."""
        self.count += 1
        self._left.append((group_of(chunk), chunk.key))

    def since(self, count: int, most: int) -> tuple[list[tuple[Group, bytes]], int, bool]:
        """The `most` first that left after so many had: (they, how many had left with the last of them, whether some
        before them are not known any more). O(those that left since)."""
        oldest = self.count - len(self._left)
        known = max(count, oldest)
        newest_first = itertools.islice(reversed(self._left), max(0, self.count - known))
        left = list(newest_first)[::-1][:most]
        return left, min(known, self.count) + len(left), count < oldest
