"""The chain below L1: chunks are written back to L2 tiers once they are stored, and brought back when a request that
waits can use them.

    L1 ──offer──▶ leased ──submit_store──▶ tiers                     write-back, beside everything else
    L1 ◀──ready── reserved ◀──submit_load── the first tier that has it    fetch, for one request that waits

Belongs to the directory's thread and never blocks. A fault of a tier is a miss. Nothing is seen before it is proved.

Each tier has a list and places of its own: one that is slow, or hangs, costs the others nothing. A write or a load has
a place, and holds a slot of L1, until its job ends, at the tier's deadline at the latest; what waits for a place is not
held. Only I/O that hangs holds slots for longer: at most one for each thread of its tier.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from lmcache_ext.engine.below import Want
from lmcache_ext.engine.directory import Chunk, Directory, Outcome
from lmcache_ext.engine.fetch import Fetch, Leg
from lmcache_ext.engine.level import Level, Offer
from lmcache_ext.engine.spans import end_job
from lmcache_ext.events import Told
from lmcache_ext.metrics import Recorder, smoothed
from lmcache_ext.tiers import JobResult, Parts
from lmcache_ext.tiers import Outcome as Fate
from lmcache_ext.tracing import NO_TRACE, Span, Trace

logger = logging.getLogger("lmcache_ext.engine")

_MOST_WRITES = 32  # write-backs under way to one tier; its queue is longer
_WRITING_SHARE = 4  # write-backs may hold a quarter of L1's slots, shared evenly by the tiers, but one each at least
_FETCHING_SHARE = 2  # fetches half of them, in the same way
_BACKLOG = 100_000  # chunks that wait to be written to one tier
_MOST_TURNS = 1024  # of them whose turn comes in one poll: what left meanwhile costs a microsecond each
_RETRY_SECONDS = 30.0  # a tier that was too slow is tried again after so long
_DRAIN_NAP = 0.002  # seconds between looks while the last write-backs end


class Lower:
    """All tiers below one directory, in the order in which they are asked.

    Args:
        parts: parts(slot, tokens): the memory of a chunk, one part for each rank.
        keeps: whether chunks stay in L1 once they are written back.
        min_uses: loads of a chunk before it is written back.
        lookup_seconds: until a look-up counts as a miss.
        only_faster: leave out what a tier brings more slowly than the engine computes.
        compute_rate: tokens/s that the engine computes; 0: not known.
        names: key → what a chunk is called below.
    """

    def __init__(
        self, directory: Directory, levels: Sequence[Level], parts: Callable[[int, int], Parts], recorder: Recorder,
        keeps: bool = True, min_uses: int = 0, lookup_seconds: float = 0.05, only_faster: bool = True,
        compute_rate: Callable[[], float] = lambda: 0.0, names: Callable[[bytes], bytes] = lambda key: key,
    ) -> None:  # fmt: skip
        self.levels = list(levels)
        self._directory, self._parts, self._recorder = directory, parts, recorder
        self._keeps, self._min_uses, self._lookup_seconds = keeps, min_uses, lookup_seconds
        self._only_faster, self._compute_rate, self._names = only_faster, compute_rate, names
        self._on: dict[tuple[int, int], Callable[[JobResult], None]] = {}  # (level, job) → who wants its result
        self._stuck: dict[tuple[int, int], Callable[[], None]] = {}  # (level, job) → what its buffer's return allows
        self._fetches: dict[str, Fetch] = {}
        self._writers = [i for i, level in enumerate(self.levels) if level.writes]
        self._readers = [i for i, level in enumerate(self.levels) if level.reads]

    # -- every step --------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take what ended. Also what enforces the tiers' deadlines."""
        for i, level in enumerate(self.levels):
            for result in level.tier.poll():
                if result.held:
                    self._recorder.count("num_held_buffers", len(result.held))
                if (then := self._on.pop((i, result.job), None)) is not None:
                    then(result)
            for job, _ in level.tier.freed():
                if (back := self._stuck.pop((i, job), None)) is not None:
                    back()
            if level.shelf:
                level.shelf.poll()
        for i in self._writers:
            level = self.levels[i]
            most = self._most_writes if level.waiting else 0
            for _ in range(min(_MOST_TURNS, len(level.waiting))):
                if level.writing >= most:
                    break
                self._write(i, level.waiting.popleft())

    @property
    def busy(self) -> bool:
        """Whether there are write-backs to do: they go on only as long as somebody polls."""
        return any(level.writing or level.waiting for level in self.levels)

    @property
    def _most_writes(self) -> int:
        """To one tier at once."""
        return min(_MOST_WRITES, max(1, self._directory.capacity // _WRITING_SHARE // len(self._writers)))

    @property
    def _most_loads(self) -> int:
        """From one tier at once."""
        return max(1, self._directory.capacity // _FETCHING_SHARE // len(self._readers))

    # -- L1 → tiers --------------------------------------------------------------------------------------------------

    def offer(self, chunks: Sequence[Chunk], trace: Trace = NO_TRACE) -> None:
        """These are ready in L1, or were used again: write them back, once they were used often enough."""
        for chunk in chunks:
            if chunk.uses != self._min_uses:
                continue
            offer = Offer(chunk, trace, len(self._writers))
            for i in self._writers:
                if len(self.levels[i].waiting) >= _BACKLOG:
                    self._skip(i, self.levels[i].waiting.popleft())
                self.levels[i].waiting.append(offer)

    def _write(self, i: int, offer: Offer) -> None:
        chunk, level = offer.chunk, self.levels[i]
        if not self._directory.hold(chunk):
            self._skip(i, offer)  # it left before its turn came
            return
        level.writing += 1
        job = level.tier.submit_store([self._names(chunk.key)], [self._parts(chunk.slot, chunk.tokens)])
        self._on[i, job] = partial(self._written, i, offer, self._span(offer.trace, "store", i))

    def _written(self, i: int, offer: Offer, span: Span, result: JobResult) -> None:
        chunk, level, fate = offer.chunk, self.levels[i], result.outcomes[0]
        level.writing -= 1
        end_job(span, result)
        if fate is Fate.OK:
            offer.stored = True
            self._recorder.count(f"{level.kind}_stored_bytes", result.nbytes)
            self._told(i, chunk)
        else:
            refused = fate in (Fate.REFUSED, Fate.FULL)
            self._recorder.count(f"{level.kind}_skipped_chunks" if refused else f"{level.kind}_failed_jobs")
        self._dealt_with(offer)
        if result.held:
            self._stuck[i, result.job] = partial(self._directory.release, [chunk])
        else:
            self._directory.release([chunk])

    def _skip(self, i: int, offer: Offer) -> None:
        """Level `i` never tries."""
        self._recorder.count(f"{self.levels[i].kind}_skipped_chunks")
        self._dealt_with(offer)

    def _dealt_with(self, offer: Offer) -> None:
        """By one level. After the last, it leaves L1 if it shall not stay there and has another place."""
        offer.due -= 1
        chunk = offer.chunk
        if not offer.due and offer.stored and not self._keeps and self._directory.ready(chunk.key) is chunk:
            self._directory.drop(chunk.key)

    # -- tiers → L1 --------------------------------------------------------------------------------------------------

    def fetch(
        self, owner: str, wants: Sequence[Want], patience: float, trace: Trace = NO_TRACE, after: Sequence[bytes] = ()
    ) -> bool:
        """Whether `owner` should go on waiting for some of `wants`, the chunks that follow what L1 has of it. Once
        False, those that came are ready in L1, and held until `release`. Asked again, `wants` is not looked at.

        Args:
            patience: seconds after which nothing is waited for.
            after: keys of what L1 has of it, that this use of it depends on.
        """
        fetch = self._fetches.get(owner)
        if fetch is None:
            tokens = sum(want.tokens for want in wants)
            rate = self._rate()
            patience = min(patience, tokens / rate + self._lookup_seconds) if rate else patience
            span = trace.begin("lmcache.fetch", chunks=len(wants), tokens=tokens)
            legs = [Leg() for _ in self.levels]
            fetch = Fetch(wants, time.monotonic() + patience, span, [None] * len(wants), legs)
            self._fetches[owner] = fetch
            # What is brought must push out neither what it follows nor what comes behind it.
            ready = [chunk for key in after if (chunk := self._directory.ready(key)) is not None]
            fetch.before = [chunk for chunk in ready if self._directory.hold(chunk)]
            for n in range(len(wants)):
                self._hold(fetch, n)
            self._look(fetch, 0)
        self.poll()
        return self._advance(fetch)

    def knows(self, owner: str) -> bool:
        """Whether a fetch for `owner` was begun and not released."""
        return owner in self._fetches

    def soon(self, owner: str) -> tuple[Sequence[Want], float]:
        """What `owner` still waits for, and in how many seconds it has probably come, at the rate of what has. Nothing
        unless all of it has its place in L1 and is being read."""
        fetch = self._fetches.get(owner)
        return fetch.soon() if fetch else ((), 0.0)

    def release(self, owner: str) -> None:
        """`owner` has what it wanted, or is gone. What is still on its way comes into L1 all the same."""
        fetch = self._fetches.pop(owner, None)
        if fetch is not None:
            fetch.finish()
            self._directory.release([*fetch.before, *fetch.held.values()])
            fetch.before, fetch.held = [], {}

    def _look(self, fetch: Fetch, i: int) -> None:
        """Ask level `i`, and then those behind it, for what nobody has yet."""
        while i < len(self.levels):
            missing = [n for n, want in enumerate(fetch.wants) if fetch.where[n] is None and not self._near(want.key)]
            if not missing:
                break
            if self.levels[i].reads:
                keys = [self._names(fetch.wants[n].key) for n in missing]
                job = self.levels[i].tier.lookup(keys, self._lookup_seconds)
                self._on[i, job] = partial(self._looked, fetch, i, missing, self._span(fetch.span.trace, "lookup", i))
                return
            i += 1
        if not fetch.over:
            self._load(fetch)

    def _looked(self, fetch: Fetch, i: int, missing: list[int], span: Span, result: JobResult) -> None:
        end_job(span, result)
        fetch.looked(i, missing, result.ok)
        self._look(fetch, i + 1)

    def _near(self, key: bytes) -> bool:
        """Whether it is in L1, or on its way there."""
        return self._directory.ready(key) is not None or self._directory.coming(key)

    def _load(self, fetch: Fetch) -> None:
        end = 0
        while end < len(fetch.wants) and (fetch.where[end] is not None or self._near(fetch.wants[end].key)):
            end += 1
        fetch.begin(self._worth(fetch, end))
        self._send(fetch)

    def _send(self, fetch: Fetch) -> None:
        """As many loads as there is room for. Where there is none, those under way may make some."""
        while fetch.sent < fetch.end and self._load_one(fetch, fetch.sent):
            fetch.sent += 1
        if not fetch.loads:
            fetch.cut(fetch.sent)

    def _rate(self) -> float:
        """Tokens/s that a tier has to beat; 0: none."""
        return self._compute_rate() if self._only_faster else 0.0

    def _worth(self, fetch: Fetch, end: int) -> int:
        """How many of the first `end` wants to bring: so many that it probably gains most over computing. A level that
        was not tried lately costs nothing: it may have become faster."""
        rate, now = self._rate(), time.monotonic()
        if not rate:
            return end
        worth, most, gain = 0, 0.0, 0.0  # seconds
        for n, want in enumerate(fetch.wants[:end]):
            gain += want.tokens / rate
            if (i := fetch.where[n]) is not None and now - self.levels[i].tried <= _RETRY_SECONDS:
                gain -= self._seconds(self.levels[i], want.tokens)
            if gain > most:
                worth, most = n + 1, gain
        self._recorder.count("num_slow_tier_tokens", sum(want.tokens for want in fetch.wants[worth:end]))
        return worth

    def _seconds(self, level: Level, tokens: int) -> float:
        """That a chunk's load adds; 0: not known."""
        return sum(part.nbytes for part in self._parts(0, tokens)) / level.rate if level.rate else 0.0

    def _load_one(self, fetch: Fetch, n: int) -> bool:
        """Bring one chunk, if it is not there; False: not now."""
        want, i = fetch.wants[n], fetch.where[n]
        if self._near(want.key):
            return True
        if i is None or self.levels[i].fetching >= self._most_loads:
            return False  # None: it was in L1 a moment ago
        chunk = self._directory.prepare_store(want.key, want.tokens, want.note)
        if isinstance(chunk, Outcome):
            return False
        level = self.levels[i]
        level.tried = time.monotonic()
        job = level.tier.submit_load([self._names(want.key)], [self._parts(chunk.slot, chunk.tokens)])
        self._on[i, job] = partial(self._loaded, fetch, n, i, chunk, self._span(fetch.span.trace, "load", i))
        level.fetching += 1
        fetch.legs[i].begin(level.tried)
        return True

    def _loaded(self, fetch: Fetch, n: int, i: int, chunk: Chunk, span: Span, result: JobResult) -> None:
        level, ok = self.levels[i], result.outcomes[0] is Fate.OK
        end_job(span, result)
        level.fetching -= 1
        fetch.arrived(n, i, ok, result.nbytes)
        if result.held:
            self._directory.abandon(chunk)
            self._stuck[i, result.job] = partial(self._directory.complete_store, chunk, False)
        else:
            self._directory.complete_store(chunk, ok)
        if ok:
            self._recorder.count(f"{level.kind}_loaded_bytes", result.nbytes)
            self._recorder.count(f"{level.kind}_hit_tokens", chunk.tokens)
            self._told(i, chunk)
            self._hold(fetch, n)
        else:
            self._recorder.count(f"{level.kind}_failed_jobs", result.outcomes[0] is not Fate.MISS)
        if not fetch.legs[i].loads:
            level.rate = smoothed(level.rate, fetch.legs[i].rate)

    def _hold(self, fetch: Fetch, n: int) -> bool:
        """Keep a ready chunk for its request. False: it is not ready."""
        if fetch.over or n in fetch.held:
            return n in fetch.held
        chunk = self._directory.ready(fetch.wants[n].key)
        if chunk is None or not self._directory.hold(chunk):
            return False
        fetch.held[n] = chunk
        return True

    def _advance(self, fetch: Fetch) -> bool:
        if fetch.over:
            return False
        if fetch.looking:
            return True  # ends by the look-up's own deadline
        self._send(fetch)
        while fetch.done < fetch.end:
            if self._hold(fetch, fetch.done):
                fetch.done += 1
            elif self._directory.coming(fetch.wants[fetch.done].key):
                break
            else:
                fetch.cut(fetch.done)
        if fetch.done >= fetch.end or time.monotonic() >= fetch.give_up:
            fetch.finish()
        return not fetch.over

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _told(self, i: int, chunk: Chunk) -> None:
        """Level `i` has this chunk: routers may want to know."""
        if (shelf := self.levels[i].shelf) is not None:
            shelf.stored(self._names(chunk.key), chunk)

    def chunks(self) -> list[Told]:
        """All below that routers know of."""
        return [told for level in self.levels if level.shelf for told in level.shelf.chunks()]

    def _span(self, trace: Trace, what: str, i: int) -> Span:
        """Of a job that was just submitted to level `i`: its time in the tier's queue counts."""
        return trace.begin(f"lmcache.tier.{what}", tier=self.levels[i].kind)

    def measure(self, recorder: Recorder) -> None:
        """Bring gauges up to date."""
        for level in self.levels:
            counts = level.tier.counts()
            recorder.gauge(f"{level.kind}_usage_bytes", counts.used)
            recorder.gauge(f"{level.kind}_objects", counts.objects)
            recorder.gauge(f"{level.kind}_breaker_trips", counts.trips)
            recorder.gauge(f"{level.kind}_corrupt_objects", sum(
                n for (_, fate), n in counts.keys.items() if fate in (Fate.CORRUPT, Fate.FOREIGN)
            ))  # fmt: skip

    def close(self, timeout: float) -> None:
        """Let write-backs end, for at most `timeout` seconds, then close the tiers."""
        deadline = time.monotonic() + timeout
        while self.busy and time.monotonic() < deadline:
            self.poll()
            time.sleep(_DRAIN_NAP)
        if self.busy:
            left = sum(level.writing + len(level.waiting) for level in self.levels)
            logger.warning("%d chunks were not written back within %.1f s", left, timeout)
        for level in self.levels:
            level.tier.close(1.0)
