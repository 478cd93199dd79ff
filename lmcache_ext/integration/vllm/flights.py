"""Plans under way: who waits for them, what they hold, and until when.

A store holds a reservation for each chunk and a reference on each source block; a load holds a lease on each chunk.
All of it comes back when every worker has reported, or, for a store's blocks, at its deadline.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.metadata import Report, Tally
from lmcache_ext.telemetry import Stores
from lmcache_ext.tracing import NO_SPAN, Span
from lmcache_ext.transfer.base import Plan, Way

logger = get_logger("scheduler")

_STEPS_UNTIL_RUN = 2  # vLLM begins a step while the one before still runs


@dataclass
class Flight:
    """One plan and what it holds."""

    plan: Plan
    request_id: str
    chunks: list[Chunk]
    tokens: int
    pinned: list[Any] = field(default_factory=list)  # vLLM's KVCacheBlock, stores only
    replaces: list[bytes] = field(default_factory=list)  # partial chunks that a fuller one makes superfluous
    end: int = 0  # where a load's tokens end in its request
    before: int = 0  # tokens of the same promise that earlier loads brought
    unfinished: bool = False  # whether another load follows, for the rest of what was promised
    first_of_keys: list[bytes] = field(default_factory=list)  # chunks that nobody else was loading before
    table: list[int] = field(default_factory=list)  # a load's: the request's blocks, also those it has yet to compute
    born: float = field(default_factory=time.monotonic)
    steps: int = 0  # that the engine began since it was planned
    deadline: float = float("inf")
    doomed: bool = False  # its bytes must never be seen
    cancelled: bool = False  # a store that we gave up, though nothing is wrong with it
    tally: Tally = field(default_factory=Tally)
    span: Span = NO_SPAN

    def end_span(self) -> None:
        """Every worker is done with it."""
        fault = "failed" if self.tally.failed else "its bytes are not used" if self.doomed else ""
        self.span.end(fault, bytes=self.tally.nbytes, seconds=self.tally.seconds)

    def first_of(self, invalid: Collection[int]) -> int:
        """Index of the first target that is in `invalid`."""
        return next(i for i, block in enumerate(self.plan.blocks.tolist()) if block in invalid)

    def chunks_from(self, first: int, blocks_per_chunk: int) -> list[Chunk]:
        """Chunks that the plan's rows from that index on belong to."""
        slots = set((self.plan.rows[first:] // blocks_per_chunk).tolist())
        return [chunk for chunk in self.chunks if chunk.slot in slots]


class Pins:
    """References on the GPU's blocks, so that a source isn't reused while it is copied.

    A pin on a live request's block costs nothing. Once the request is gone, vLLM still counts the block as used, both
    when a running request grows and at admission. So while blocks that nothing but a store holds are more than
    `fraction` of all blocks, and more than half as many as are free, no further store is planned; those under way end
    in milliseconds, or at their deadline. Where much is free they cost nobody anything, and requests that come and go
    within a step or two, before the completion of their stores is noticed, are stored whole.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction
        self._pool: Any = None  # vLLM's BlockPool
        self._held: list[list[Any]] = []
        self.count = 0

    def bind(self, pool: Any) -> None:
        """Called once, before the first request."""
        self._pool = pool

    def spare(self) -> bool:
        """Whether a store may be planned now. O(pinned blocks): ask once a step."""
        if self._pool is None:
            return False
        orphans = sum(1 for blocks in self._held for block in blocks if block.ref_cnt == 1)
        few = self._fraction * self._pool.num_gpu_blocks
        return bool(orphans <= max(few, self._pool.get_num_free_blocks() // 2))

    def alone(self) -> bool:
        """Whether nobody else holds a block. O(pinned blocks)."""
        if self._pool is None:
            return False
        ours = Counter(block.block_id for held in self._held for block in held)
        orphans = sum(self._pool.blocks[block_id].ref_cnt == count for block_id, count in ours.items())
        null = 1  # vLLM's block 0 is never free
        return bool(self._pool.get_num_free_blocks() + orphans >= self._pool.num_gpu_blocks - null)

    def pin(self, block_ids: Iterable[int]) -> list[Any]:
        """Hold these blocks until `unpin`."""
        blocks = [self._pool.blocks[block_id] for block_id in block_ids]
        self._pool.touch(blocks)
        self._held.append(blocks)
        self.count += len(blocks)
        return blocks

    def unpin(self, blocks: list[Any]) -> None:
        """Give them back; the last of a chain leaves vLLM's prefix cache first."""
        self._held = [held for held in self._held if held is not blocks]
        self._pool.free_blocks(reversed(blocks))
        self.count -= len(blocks)


class Flights:
    """All plans under way. One thread, never blocks."""

    def __init__(self, directory: Directory, pins: Pins, workers: int, store_timeout: float, stores: Stores) -> None:
        self._store_timeout = store_timeout
        self._directory = directory
        self._pins = pins
        self._workers = workers
        self._open: dict[int, Flight] = {}
        self._loading: dict[bytes, Flight] = {}  # the first load under way of each key
        self._next_id = 0
        self._unpublished: list[Flight] = []  # written, but readers may not find them yet
        self._stores = stores  # wants to know of each store when it begins and ends

    def next_id(self) -> int:
        """A plan id; ids rise."""
        self._next_id += 1
        return self._next_id

    def add(self, flight: Flight) -> None:
        """`flight` is on its way to the workers."""
        self._open[flight.plan.id] = flight
        if flight.plan.way is Way.STORE:
            self._stores.began(flight.request_id, flight.plan.id)
        else:
            flight.first_of_keys = [c.key for c in flight.chunks if self._loading.setdefault(c.key, flight) is flight]

    def follow(self, first: Flight, then: Flight | None = None) -> None:
        """What `first` began goes on with `then`, or is over."""
        for key in first.first_of_keys:
            if then is not None:
                self._loading[key] = then
            else:
                del self._loading[key]
        if then is not None:
            then.first_of_keys += first.first_of_keys
        first.first_of_keys = []

    def under_way(self, flight: Flight) -> bool:
        """Whether some worker has not reported on it."""
        return flight.plan.id in self._open

    def __len__(self) -> int:
        return len(self._open)

    @property
    def loading(self) -> bool:
        """Whether a load is under way."""
        return bool(self._loading)

    def shares(self, request_id: str, key: bytes, local: int, patience: float) -> bool:
        """Whether another request is loading `key` and will bring tokens behind `local`: once it has, vLLM's own prefix
        cache serves both. Not if that load is older than `patience` seconds."""
        flight = self._loading.get(key)
        return (
            flight is not None
            and flight.request_id != request_id
            and flight.end > local
            and not flight.doomed
            and time.monotonic() - flight.born < patience
        )

    @property
    def storing(self) -> bool:
        """Whether a store still reads blocks of the GPU, unless it hangs, or somebody is to be told of it."""
        now = time.monotonic()
        return bool(self._unpublished) or any(
            flight.pinned or flight.deadline > now for flight in self._stores_under_way()
        )

    def cancel_stores(self, request_id: str) -> list[int]:
        """Ids of a request's stores: they need not run if they have not begun."""
        stores = [each for each in self._stores_under_way() if each.request_id == request_id]
        for flight in stores:
            flight.cancelled = True
        return [flight.plan.id for flight in stores]

    def _stores_under_way(self) -> list[Flight]:
        return [flight for flight in self._open.values() if flight.plan.way is Way.STORE]

    def loads(self) -> list[Flight]:
        """Loads under way."""
        return [flight for flight in self._open.values() if flight.plan.way is Way.LOAD]

    def settle(self, report: Report) -> list[Flight]:
        """Take in what workers reported; flights that every worker is done with, with all they held given back."""
        landed = []
        for plan_id, tally in report.done.items():
            flight = self._open.get(plan_id)
            if flight is None:
                continue
            flight.tally = flight.tally.add(tally)
            if flight.tally.workers >= self._workers:
                del self._open[plan_id]
                self._land(flight)
                landed.append(flight)
                if flight.plan.way is Way.STORE:
                    self._ended(flight)
        return landed

    def _ended(self, flight: Flight) -> None:
        """A store is over; whoever waits is told once readers can find it."""
        if flight.tally.failed or flight.doomed:
            self._stores.ended(flight.plan.id, False)
        else:
            self._unpublished.append(flight)
            self.publish()

    def publish(self) -> None:
        """Tell of stores that readers can find by now."""
        for flight in list(self._unpublished):
            if (known := self._directory.published(flight.chunks)) is not None:
                self._unpublished.remove(flight)
                self._stores.ended(flight.plan.id, known)

    def tick(self) -> None:
        """A step begins. A store's time runs from when the step that carried it is over: a step may take long, and
        where nothing ends vLLM tells us nothing, so steps are what we count."""
        self.publish()
        for flight in self._open.values():
            flight.steps += 1
            if flight.steps == _STEPS_UNTIL_RUN:
                flight.deadline = time.monotonic() + self._store_timeout

    def expire(self) -> list[Flight]:
        """Stores past their deadline: their blocks go back now, and what they still write is never seen."""
        now = time.monotonic()
        late = [f for f in self._open.values() if f.pinned and f.deadline < now]
        for flight in late:
            logger.error(
                "store %d did not end within %s s (LMCACHE_STORE_TIMEOUT_SECS); %d GPU blocks given back",
                flight.plan.id,
                self._store_timeout,
                len(flight.plan.blocks),
            )
            self._abandon(flight)
        return late

    def give_up_stores(self) -> list[Flight]:
        """The blocks that stores hold are wanted now: what these still write is never seen. Returns them."""
        stores = [flight for flight in self._stores_under_way() if flight.pinned]
        for flight in stores:
            self._abandon(flight)
        return stores

    def _abandon(self, store: Flight) -> None:
        store.cancelled = True  # whoever abandons it says what that means
        self._doom(store)
        self._unpin(store)
        self._stores.ended(store.plan.id, False)

    def doom_stores(self) -> None:
        """What stores under way hold was computed from bytes that never arrived: it must not be seen."""
        for flight in self._stores_under_way():
            flight.cancelled = True
            self._doom(flight)

    def failed_loads(self, invalid: Collection[int]) -> list[Flight]:
        """Loads under way of which at least one target is in `invalid`."""
        return [
            flight for flight in self.loads() if not flight.doomed and set(flight.plan.blocks.tolist()) & set(invalid)
        ]

    def _doom(self, flight: Flight) -> None:
        flight.doomed = True
        for chunk in flight.chunks:
            self._directory.abandon(chunk)

    def _land(self, flight: Flight) -> None:
        if flight.plan.way is Way.LOAD:
            if not flight.unfinished:
                self.follow(flight)
            self._directory.release(flight.chunks)
            return
        ok = not flight.tally.failed and not flight.doomed
        for chunk in flight.chunks:
            self._directory.complete_store(chunk, ok)
        if ok:
            for key in flight.replaces:
                self._directory.drop(key)
        self._unpin(flight)

    def _unpin(self, flight: Flight) -> None:
        if flight.pinned:
            self._pins.unpin(flight.pinned)
            flight.pinned = []
