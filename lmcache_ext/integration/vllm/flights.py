"""Plans under way: who waits for them, what they hold, and until when.

A store holds a reservation for each chunk and a reference on each source block; a load holds a lease on each chunk.
All of it comes back when every worker has reported, or, for a store's blocks, at its deadline.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from lmcache_ext.engine import Chunk, Directory
from lmcache_ext.integration.vllm.metadata import Report, Tally
from lmcache_ext.transfer.base import Plan, Way

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
    born: float = field(default_factory=time.monotonic)
    steps: int = 0  # that the engine began since it was planned
    deadline: float = float("inf")
    doomed: bool = False  # its bytes must never be seen
    tally: Tally = field(default_factory=Tally)


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

    def __init__(self, directory: Directory, pins: Pins, workers: int, store_timeout: float) -> None:
        self._store_timeout = store_timeout
        self._directory = directory
        self._pins = pins
        self._workers = workers
        self._open: dict[int, Flight] = {}
        self._loading: dict[bytes, Flight] = {}  # the first load under way of each key
        self._next_id = 0

    def next_id(self) -> int:
        """A plan id; ids rise."""
        self._next_id += 1
        return self._next_id

    def add(self, flight: Flight) -> None:
        """`flight` is on its way to the workers."""
        self._open[flight.plan.id] = flight
        if flight.plan.way is Way.LOAD:
            for chunk in flight.chunks:
                self._loading.setdefault(chunk.key, flight)

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
        """Whether a store still holds blocks of the GPU."""
        return any(flight.pinned for flight in self._open.values())

    def of(self, request_id: str, way: Way) -> list[int]:
        """Ids of a request's plans."""
        return [i for i, f in self._open.items() if f.request_id == request_id and f.plan.way is way]

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
        return landed

    def tick(self) -> None:
        """A step begins. A store's time runs from when the step that carried it is over: a step may take long, and
        where nothing ends vLLM tells us nothing, so steps are what we count."""
        for flight in self._open.values():
            flight.steps += 1
            if flight.steps == _STEPS_UNTIL_RUN:
                flight.deadline = time.monotonic() + self._store_timeout

    def expire(self) -> list[Flight]:
        """Stores past their deadline: their blocks go back now, and what they still write is never seen."""
        now = time.monotonic()
        late = [f for f in self._open.values() if f.pinned and f.deadline < now]
        for flight in late:
            self._doom(flight)
            self._unpin(flight)
        return late

    def doom_stores(self) -> None:
        """What stores under way hold was computed from bytes that never arrived: it must not be seen."""
        for flight in self._open.values():
            if flight.plan.way is Way.STORE:
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
            for chunk in flight.chunks:
                if self._loading.get(chunk.key) is flight:
                    del self._loading[chunk.key]
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
