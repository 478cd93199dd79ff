"""Where a receiver's slots come from: the contract, and a Directory that keeps it.

absent ──reserve──▶ reserved ──commit by every writer──▶ ready, held for the decode request ──claim, or time──▶ ready
                       └──abandon──▶ never to be seen, its slot taken ──give_back by every writer──▶ absent

A writer is one rank of the prefill engine that writes to one rank of this one: as many as the two TP sizes want.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from lmcache_ext.engine.directory import Chunk, Directory, Outcome


@dataclass(eq=False)
class Ticket:
    """The right of a chunk's writers to write it. Each of them commits it or gives it back, once."""

    chunk: Chunk
    req_id: str
    writers: int  # that may still write
    last: bytes  # key of its request's last chunk
    good: bool = True


@dataclass(frozen=True)
class Place:
    """Where a chunk goes, or is: `ticket` None says that its bytes are there already."""

    slot: int
    ticket: Ticket | None


class Store(Protocol):
    """One engine's slots, for the receivers of its ranks. No method blocks for longer than a lock is held; receivers
    call from their own threads."""

    def reserve(
        self, req_id: str, writer: int, writers: int, keys: Sequence[bytes], tokens: Sequence[int]
    ) -> list[Place] | None:
        """A place for each key, all or none: what is there already is kept for `req_id`. None: not now, because slots
        are taken, or somebody is writing one of the keys. All `writers` that name the same `req_id` and keys share
        places."""

    def commit(self, ticket: Ticket) -> None:
        """A writer's bytes are complete and proved. The chunk is visible once they all are."""

    def abandon(self, ticket: Ticket) -> None:
        """The chunk must never be seen; bytes may still arrive, so its slot stays taken."""

    def give_back(self, ticket: Ticket) -> None:
        """A writer's bytes can't arrive any more. Abandons, too."""

    def claim(self, req_id: str) -> None:
        """Nothing need be kept for `req_id` any more: its decode request has what it needs, or will not come."""

    def expire(self) -> None:
        """Let go of what nobody came for. Called at least once a second."""


@dataclass(eq=False)
class _Joint:
    """A reservation that other writers may still join."""

    keys: tuple[bytes, ...]
    places: list[Place]
    writers: int
    missing: set[int]
    until: float


@dataclass
class _Held:
    last: bytes  # the key by which its decode request is known
    chunks: list[Chunk] = field(default_factory=list)
    until: float = 0.0


class DirectoryStore:
    """A Store in a Directory. Everybody who touches that directory does so under `lock`.

    Args:
        directory: the engine's.
        lock: held for microseconds, and never over a wait.
        ttl_s: seconds for which a handed-over chunk is kept from eviction if nobody calls `claim`, and for which
            writers may be late.
    """

    def __init__(self, directory: Directory, lock: AbstractContextManager[object], ttl_s: float = 60.0) -> None:
        self._directory = directory
        self._lock = lock
        self._ttl_s = ttl_s
        self._joints: dict[str, _Joint] = {}  # guarded by lock, as below
        self._held: dict[str, _Held] = {}
        self._by_last: dict[bytes, dict[str, None]] = {}  # last key → requests that wait for their decode request
        self.unclaimed = 0  # requests that nobody came for

    def reserve(
        self, req_id: str, writer: int, writers: int, keys: Sequence[bytes], tokens: Sequence[int]
    ) -> list[Place] | None:
        """See Store."""
        with self._lock:
            joint = self._joints.get(req_id)
            same = joint is not None and joint.writers == writers and joint.keys == tuple(keys)
            if joint is not None and same and writer in joint.missing:
                joint.missing.discard(writer)
                if not joint.missing:
                    del self._joints[req_id]
                return joint.places
            if joint is not None or any(map(self._directory.coming, keys)):
                return None
            places = self._reserve(req_id, writers, keys, tokens)
            if places is not None and writers > 1:
                missing = set(range(writers)) - {writer}
                until = time.monotonic() + self._ttl_s
                self._joints[req_id] = _Joint(tuple(keys), places, writers, missing, until)
            return places

    def _reserve(self, req_id: str, writers: int, keys: Sequence[bytes], tokens: Sequence[int]) -> list[Place] | None:
        directory = self._directory
        known = [directory.ready(key) for key in keys]
        idle = sum(chunk is not None and not chunk.leases for chunk in known)
        if not self._room(known.count(None) + idle):
            return None  # before anybody was evicted in vain
        for chunk in known:
            if chunk is not None:
                self._hold(req_id, chunk, keys[-1])
        places = []
        for chunk, key, count in zip(known, keys, tokens, strict=True):
            if chunk is not None:
                places.append(Place(chunk.slot, None))
                continue
            new = directory.prepare_store(key, count)
            if isinstance(new, Outcome):  # keys are named twice
                for place in places:
                    self._end(place.ticket, writers)
                return None
            places.append(Place(new.slot, Ticket(new, req_id, writers, keys[-1])))
        return places

    def _room(self, slots: int) -> bool:
        """Whether `slots` are free or can be evicted. O(1) unless the pool is crowded: 5 ms with 100,000 chunks."""
        directory = self._directory
        if slots <= directory.capacity - directory.leases:  # what is leased is counted at least once
            return True
        idle = sum(not chunk.leases for chunk in directory.chunks())
        return slots <= directory.capacity - directory.used + idle

    def commit(self, ticket: Ticket) -> None:
        """See Store."""
        with self._lock:
            ticket.writers -= 1
            if ticket.writers == 0:
                visible = ticket.good
                self._directory.complete_store(ticket.chunk, visible)
                if visible:
                    self._hold(ticket.req_id, ticket.chunk, ticket.last)

    def abandon(self, ticket: Ticket) -> None:
        """See Store."""
        with self._lock:
            ticket.good = False
            self._directory.abandon(ticket.chunk)

    def give_back(self, ticket: Ticket) -> None:
        """See Store."""
        with self._lock:
            self._end(ticket, 1)

    def _end(self, ticket: Ticket | None, writers: int) -> None:
        if ticket is None:
            return
        ticket.good = False
        self._directory.abandon(ticket.chunk)
        ticket.writers -= writers
        if ticket.writers == 0:
            self._directory.complete_store(ticket.chunk, False)

    def claim(self, req_id: str) -> None:
        """See Store."""
        with self._lock:
            self._directory.release(self._let_go(req_id))

    def claim_by(self, keys: Sequence[bytes]) -> str | None:
        """A decode request has what it needs, and these keys: claim for it one request whose last chunk is among them,
        the one that came first. Returns which."""
        with self._lock:
            for key in keys:
                for req_id in self._by_last.get(key, ()):
                    self._directory.release(self._let_go(req_id))
                    return req_id
        return None

    def _let_go(self, req_id: str) -> list[Chunk]:
        """What was kept for it."""
        held = self._held.pop(req_id, None)
        if held is None:
            return []
        names = self._by_last.get(held.last, {})
        names.pop(req_id, None)
        if not names:
            self._by_last.pop(held.last, None)
        return held.chunks

    def expire(self) -> None:
        """See Store."""
        now = time.monotonic()
        with self._lock:
            for req_id in [r for r, held in self._held.items() if held.until <= now]:
                self._directory.release(self._let_go(req_id))
                self.unclaimed += 1
            for req_id in [r for r, joint in self._joints.items() if joint.until <= now]:
                late = self._joints.pop(req_id)
                for place in late.places:
                    self._end(place.ticket, len(late.missing))

    def _hold(self, req_id: str, chunk: Chunk, last: bytes) -> None:
        if self._directory.hold(chunk):
            held = self._held.setdefault(req_id, _Held(last))
            self._by_last.setdefault(held.last, {})[req_id] = None
            held.chunks.append(chunk)
            held.until = time.monotonic() + self._ttl_s

    @property
    def holds(self) -> int:
        """Requests whose chunks are kept for them."""
        return len(self._held)
