"""What routers were told of a tier below host memory."""

from __future__ import annotations

from lmcache_ext.events import Announcement, EventLog, Noted, Told
from lmcache_ext.tiers import Tier

_MOST_TOLD = 1 << 15  # chunks, of some KB each


class Shelf:
    """One tier's. Directory's thread, never blocks.

    A chunk that the tier found at its start is told once a request has brought it: until then nobody knows its tokens.
    """

    def __init__(self, tier: Tier, log: EventLog) -> None:
        self._tier, self._log = tier, log
        self._told: dict[bytes, Told] = {}  # by the tier's key

    def chunks(self) -> list[Told]:
        """All that routers know of."""
        return list(self._told.values())

    def stored(self, name: bytes, chunk: Noted) -> None:
        """The tier has this chunk, under that key."""
        note = chunk.note
        if name in self._told or len(self._told) >= _MOST_TOLD or not isinstance(note, Announcement):
            return
        if self._tier.holds(name):
            self._told[name] = Told(note)
            self._log.stored(self._told[name])

    def poll(self) -> None:
        """Take back what has left."""
        left, more = self._tier.left()
        for name in list(self._told) if more else left:
            if (told := self._told.pop(name, None)) is not None:
                self._log.removed(told)
