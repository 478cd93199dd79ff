"""An engine's seat at a shared cache server: whose memory its workers have mapped, and what it holds there.

    no server ──Welcome, Joined──▶ found ──order──▶ told ──every worker has it──▶ usable
        ▲                            │                │                             │
        └────────────── the session is over ──────────┴─────────────────────────────┘

Chunks are promised and stored in the last state only. A server that is started anew brings another session and another
segment: plans for the old one are never mixed with plans for the new one, because the order goes out behind them all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from vllm.v1.request import Request

from lmcache_ext.engine import Chunk, Want
from lmcache_ext.events import Announcement, EventLog, Noted
from lmcache_ext.integration.vllm import events
from lmcache_ext.integration.vllm.flights import Flights
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.metadata import Attach, Report, Tally
from lmcache_ext.metrics import Recorder
from lmcache_ext.server.client import Client, Spec
from lmcache_ext.server.link import Attachment
from lmcache_ext.server.mirror import Mirror, Note
from lmcache_ext.server.news import News
from lmcache_ext.server.protocol import salt_digest
from lmcache_ext.server.seeker import Seeker
from lmcache_ext.tracing import NO_TRACE, Span, Trace
from lmcache_ext.transfer.segment import Segment

logger = get_logger("seat")

_SILENT_SECONDS = 5.0  # without a word of the server, after which routers need not count on it


class Seat:
    """One engine's. Scheduler's thread only, never blocks.

    Args:
        client: of the server; every process that touches its memory is named to it.
        spec: the group of this engine's chunks, in its first epoch.
        blocks_per_chunk: rows of a slot.
        parts: by rank, which of a slot's parts it copies to and from.
        log: for what routers shall know; None: they hear nothing.
    """

    def __init__(
        self, client: Client, spec: Spec, blocks_per_chunk: int, parts: Sequence[int], log: EventLog | None = None
    ) -> None:
        self._client, self._spec = client, spec
        client.join(spec)
        self.news = News(client, log) if log else None
        self.mirror = Mirror(client, spec.root, self.news)
        self._seeker = Seeker(self.mirror)
        self._bpc, self._parts = blocks_per_chunk, tuple(parts)
        self._told: Attachment | None = None  # whose memory the workers were ordered to map
        self._order = 0  # the order's id
        self._tally = Tally()
        self._waits: dict[str, Span] = {}  # look-ups under way, by request
        self._heard = 0.0  # when the server was there last

    def move(self, root: bytes) -> bytes:
        """From now on chunks belong to another namespace. Returns it."""
        if root != self.mirror.root:
            before, self.mirror.root = self.mirror.root, root
            self._client.join(Spec(root, self._spec.model, self._spec.parts, self._spec.tokens))
            self._client.leave(before)
        return root

    @staticmethod
    def noting(what: events.Note) -> events.Note:
        """What the mirror wants to know of a chunk: its salt, who stores it, and what to tell of it."""

        def note(request: Request, start: int, end: int) -> Note:
            told = what(request, start, end)
            announcement = told if isinstance(told, Announcement) else None
            return Note(salt_digest(request.cache_salt or ""), str(request.request_id), announcement)

        return note

    # -- the workers' mapping ----------------------------------------------------------------------------------------

    def _there(self) -> Attachment | None:
        """The session of now, once it knows our group."""
        at = self._client.attachment
        return at if at is not None and self.mirror.root in at.groups and at.welcome.extent else None

    def order(self, flights: Flights) -> Attach | None:
        """What the workers are to map behind this step's plans; None: what they have, or nothing."""
        at = self._there()
        if at is None:
            return None
        if at is self._told:
            self._use()  # another namespace in the same memory
            return None
        self._told, self._order, self._tally = at, flights.next_id(), Tally()
        welcome, starts = at.welcome, tuple(at.groups[self.mirror.root].starts)
        segment = Segment(welcome.path, welcome.size, welcome.extent, starts, self._bpc)
        return Attach(self._order, segment, self._parts)

    def told(self, report: Report) -> None:
        """What the workers say."""
        tally = report.done.get(self._order)
        if tally is None or self._told is None:
            return
        self._tally = self._tally.add(tally)
        if self._tally.failed:
            logger.error("%d workers can't map the cache server's memory; nothing is cached", self._tally.failed)
        elif self._tally.workers >= len(self._parts):
            logger.info("the cache server's memory is mapped: %.2f GB", self._told.welcome.size / (1 << 30))
            self._use()

    def _use(self) -> None:
        if self._tally.workers >= len(self._parts) and not self._tally.failed and self._there() is self._told:
            self.mirror.use(self._told)

    # -- as what brings chunks ---------------------------------------------------------------------------------------

    def poll(self) -> None:
        """A step begins."""
        if self.mirror.usable is not None and self._there() is not self.mirror.usable:
            self.mirror.use(None)
        self.mirror.poll()
        if self.news:
            now = time.monotonic()
            self._heard = now if self._client.up else self._heard
            lost = now - self._heard > _SILENT_SECONDS
            self.news.poll(None if lost else self.mirror.usable, self.mirror.root)

    @property
    def busy(self) -> bool:
        """Whether an order is to be given or answered, or the server's answers can be used by a next step."""
        there = self._there()
        waits = there is not None and (there is not self._told or self._tally.workers < len(self._parts))
        return waits or self.mirror.busy

    def offer(self, chunks: Sequence[Chunk], trace: Trace = NO_TRACE) -> None:
        """The server writes back."""

    def knows(self, owner: str) -> bool:
        """Whether a look-up for this request is under way."""
        return self._seeker.knows(owner)

    def fetch(
        self, owner: str, wants: Sequence[Want], patience: float, trace: Trace = NO_TRACE, after: Sequence[bytes] = ()
    ) -> bool:
        """Ask the server for `wants`. True: it has not answered yet."""
        if owner not in self._waits:
            self._waits[owner] = trace.begin("lmcache.fetch", chunks=len(wants))
        if self._seeker.fetch(owner, wants, patience):
            return True
        self._waits.pop(owner).end(found=self._seeker.brought(owner))
        return False

    def soon(self, owner: str) -> tuple[Sequence[Want], float]:
        """Nothing: the server answers once all has come."""
        return (), 0.0

    def release(self, owner: str) -> None:
        """The request has leased what it uses, or is gone."""
        self._seeker.release(owner)
        if (span := self._waits.pop(owner, None)) is not None:
            span.end("the request went")

    def chunks(self) -> Sequence[Noted]:
        """All that routers were told of."""
        return self.news.chunks() if self.news else ()

    def measure(self, recorder: Recorder) -> None:
        """Whether the server is in use, and how much of it is held."""
        recorder.gauge("server_in_use", int(self._client.up and self.mirror.usable is not None))
        recorder.gauge("pinned_memory_objs_count", self.mirror.leases)

    def close(self, timeout: float) -> None:
        """The engine ends. A worker may still be copying what is held."""
        self._client.close(timeout, bye=not self.mirror.used)
