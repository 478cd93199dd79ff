"""What an engine has told routers of a server's chunks, and takes back once they have left.

Where a chunk stands in time is said by how many had left the server: a chunk that was there when `at` had left is gone
if it is among those that left later, and is not if they left before, in whatever order the answers are looked at.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque

from lmcache_ext.events import Announcement, EventLog, Told
from lmcache_ext.server import protocol as p
from lmcache_ext.server.client import Client
from lmcache_ext.server.link import Attachment, Call

_ASK_SECONDS = 0.1
_MOST_FALSE = 1 << 20  # more are not taken back, where nobody takes events
_MOST_LEFT = 1 << 16  # departures that are remembered for what is still to be heard of


class News:
    """One engine's. Scheduler's thread, never blocks."""

    def __init__(self, client: Client, log: EventLog) -> None:
        self._client, self._log = client, log
        self._told: dict[bytes, Told] = {}  # by key
        self._false: deque[Told] = deque(maxlen=_MOST_FALSE)  # told, not true any more, still to be taken back
        self._left: OrderedDict[bytes, int] = OrderedDict()  # key → `at` of the answer that named it
        self._about: tuple[Attachment | None, bytes] = (None, b"")  # session and root
        self._since, self._first = 0, True
        self._call: Call | None = None
        self._next = 0.0

    def chunks(self) -> list[Told]:
        """All that routers know of, and may."""
        return list(self._told.values())

    def stored(self, key: bytes, what: Announcement, at: int) -> None:
        """A chunk of this session was there when so many had left."""
        known = self._told.get(key)
        if self._left.get(key, -1) > at or (known and known.at >= at):
            return
        self._told[key] = Told(what, at)
        if not known:
            self._log.stored(self._told[key])

    def poll(self, session: Attachment | None, root: bytes) -> None:
        """A step begins. What was told of another session or root is taken back."""
        if self._about != (session, root):
            self._forget()
            self._about = (session, root)
            self._since, self._first, self._call, self._next = 0, True, None, 0.0
        self._take_back()
        if session is None:
            return
        if self._call is not None and self._call.done.is_set():
            reply, self._call = self._call.reply, None
            if isinstance(reply, p.Departed):
                self._take(reply)
        if self._call is None and (now := time.monotonic()) >= self._next:
            self._call, self._next = self._client.departures(root, self._since), now + _ASK_SECONDS

    def _take(self, reply: p.Departed) -> None:
        if reply.missed and not self._first:
            self._forget()
        for key in p.split_keys(reply.keys):
            told = self._told.get(key)
            if told is not None and told.at < reply.at:
                self._log.removed(self._told.pop(key))
            self._left[key] = reply.at
            self._left.move_to_end(key)
        while len(self._left) > _MOST_LEFT:
            self._left.popitem(last=False)
        self._since, self._first = reply.at, False
        if reply.more:
            self._next = 0.0

    def _forget(self) -> None:
        self._false.extend(self._told.values())
        self._told.clear()
        self._left.clear()
        self._take_back()

    def _take_back(self) -> None:
        for _ in range(min(len(self._false), self._log.room)):
            self._log.removed(self._false.popleft())
