"""The directory of L1: which chunk is in which slot, and in which state.

One object, one thread, never blocks. Every change is bracketed: `prepare_store` reserves, `complete_store` publishes or
takes back; nothing is visible before its bytes are complete. A lease keeps a chunk where it is; the writer of a
reserved chunk holds one too. A slot returns to the free list only when nobody can read or write it any more.

    absent ──prepare_store──▶ RESERVED ──complete_store(True)──▶ READY ──drop, eviction──▶ LEAVING (while leased)
                              RESERVED ──complete_store(False), or abandoned ────────────▶ LEAVING (while leased)
                                                                                           LEAVING ──last lease─▶ absent
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lmcache_ext.engine.slots import Slots
from lmcache_ext.policies import EvictionPolicy


class State(enum.Enum):
    """Where a chunk is in its life. Absent chunks have no record."""

    RESERVED = "reserved"  # being written, invisible
    READY = "ready"
    LEAVING = "leaving"  # invisible; its slot comes back with the last lease


class Outcome(enum.Enum):
    """Why `prepare_store` reserved nothing."""

    EXISTS = "exists"  # ready, or being written by somebody else
    FULL = "full"  # every slot is leased


@dataclass(eq=False)
class Chunk:
    """One chunk in L1. Owned by the directory; callers read it and hand it back."""

    __slots__ = ("key", "leases", "note", "slot", "state", "tokens", "uses")
    key: bytes
    slot: int
    tokens: int  # how many tokens it holds; fewer than chunk_size in a partial chunk
    note: object  # what the listener wants to know of it later; the directory never looks
    state: State
    leases: int
    uses: int  # how often it was leased


class Listener(Protocol):
    """Told of every chunk that becomes visible or stops being so, in that order."""

    def stored(self, chunk: Chunk) -> None:
        """`chunk` is ready."""

    def removed(self, chunk: Chunk) -> None:
        """`chunk` can no longer be found."""


class Directory:
    """All chunks of one engine's L1. Not thread-safe: one thread owns it. No method blocks or does I/O."""

    def __init__(self, policy: EvictionPolicy, listener: Listener | None = None, slots: Slots | None = None) -> None:
        self._policy = policy
        self._listener = listener
        self._slots = Slots() if slots is None else slots
        self._chunks: dict[bytes, Chunk] = {}  # RESERVED and READY only
        self._leaving: set[Chunk] = set()
        self.version = 0  # changes whenever a lookup may answer otherwise
        self.evicted = 0  # chunks, since the start
        self.leases = 0  # held now, by readers and writers

    # -- looking ----------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading `keys` are ready. About 0.1 µs a key."""
        find = self._chunks.get
        for i, key in enumerate(keys):
            chunk = find(key)
            if chunk is None or chunk.state is not State.READY:
                return i
        return len(keys)

    def ready(self, key: bytes) -> Chunk | None:
        """The chunk under `key` if its bytes are complete."""
        chunk = self._chunks.get(key)
        return chunk if chunk is not None and chunk.state is State.READY else None

    def coming(self, key: bytes) -> bool:
        """Whether somebody is writing the chunk under `key`."""
        chunk = self._chunks.get(key)
        return chunk is not None and chunk.state is State.RESERVED

    def touch(self, keys: Iterable[bytes]) -> None:
        """The ready ones among `keys` were used; name a chain's last chunk first, so that its head leaves last."""
        for key in keys:
            if self.ready(key) is not None:
                self._policy.touch(key)

    def chunks(self) -> list[Chunk]:
        """All ready chunks, in the order in which they became known."""
        return [c for c in self._chunks.values() if c.state is State.READY]

    def __len__(self) -> int:
        return len(self._policy)

    @property
    def capacity(self) -> int:
        """Slots in the pool."""
        return self._slots.capacity

    @property
    def used(self) -> int:
        """Slots that hold or await bytes."""
        return self._slots.capacity - self._slots.free

    # -- reading ----------------------------------------------------------------------------------------------------

    def lease(self, keys: Sequence[bytes]) -> list[Chunk] | None:
        """Hold all of `keys` until `release`; None, and nothing held, unless every one is ready."""
        chunks = [c for key in keys if (c := self.ready(key)) is not None]
        if len(chunks) < len(keys):
            return None
        for chunk in reversed(chunks):
            chunk.leases += 1
            chunk.uses += 1
            self._policy.touch(chunk.key)
        self.leases += len(chunks)
        return chunks

    def hold(self, chunk: Chunk) -> bool:
        """Keep a ready chunk where it is until `release`, without counting that as a use. False: it is not ready."""
        if chunk.state is not State.READY:
            return False
        chunk.leases += 1
        self.leases += 1
        return True

    def release(self, chunks: Iterable[Chunk]) -> None:
        """Give back one lease of each."""
        for chunk in chunks:
            chunk.leases -= 1
            self.leases -= 1
            if not chunk.leases and chunk.state is State.LEAVING:
                self._leaving.discard(chunk)
                self._slots.give(chunk.slot)

    # -- writing ----------------------------------------------------------------------------------------------------

    def prepare_store(self, key: bytes, tokens: int, note: object = None) -> Chunk | Outcome:
        """Reserve a slot for `key`; evicts if it must. The writer calls `complete_store` exactly once."""
        if (known := self._chunks.get(key)) is not None:
            if known.state is State.READY:
                self._policy.touch(key)
            return Outcome.EXISTS
        slot = self._room(note)
        if slot is None:
            return Outcome.FULL
        chunk = Chunk(key, slot, tokens, note, State.RESERVED, leases=1, uses=0)
        self._chunks[key] = chunk
        self.leases += 1
        return chunk

    def complete_store(self, chunk: Chunk, success: bool) -> None:
        """The writer is done with `chunk`'s slot: publish it, or forget it."""
        if chunk.state is State.RESERVED:
            if success:
                chunk.state = State.READY
                self._policy.insert(chunk.key)
                self.version += 1
                if self._listener:
                    self._listener.stored(chunk)
            else:
                self._leave(chunk)
        self.release([chunk])

    def abandon(self, chunk: Chunk) -> None:
        """The writer may still write, but what it writes must never be seen. Its lease stays until it completes."""
        if chunk.state is State.RESERVED:
            self._leave(chunk)

    def drop(self, key: bytes) -> None:
        """`key` must not be found again: its bytes can't be trusted, or a fuller chunk replaces it."""
        if (chunk := self.ready(key)) is not None:
            self._leave(chunk)

    def clear(self) -> int:
        """Forget everything, also what is being written. Returns how many chunks were ready."""
        count = len(self)
        for chunk in list(self._chunks.values()):
            self._leave(chunk)
        return count

    @property
    def asks(self) -> bool:
        """Whether slots are somebody else's to give, who can be asked: `expect` then says early what will be stored."""
        return False

    def expect(self, key: bytes, tokens: int, note: object = None) -> None:
        """A `prepare_store` of this comes in this step or the next."""

    def published(self, chunks: Sequence[Chunk]) -> bool | None:
        """Whether readers find these, which `complete_store` has published; None: that is not known yet."""
        return True

    def flush(self) -> None:
        """No more `prepare_store` in this step."""

    def grow(self, capacity: int) -> None:
        """The pool has `capacity` slots now."""
        self._slots.grow(capacity)

    def _room(self, note: object) -> int | None:
        """A slot for a chunk with this note, evicting if it must; None: there is none to be had."""
        slot = self._slots.take()
        return self._slots.take() if slot is None and self._evict() else slot

    def _evict(self) -> bool:
        for key in self._policy.victims():
            if not self._chunks[key].leases:
                self._leave(self._chunks[key])
                self.evicted += 1
                return True
        return False

    def _leave(self, chunk: Chunk) -> None:
        was_ready = chunk.state is State.READY
        chunk.state = State.LEAVING
        del self._chunks[chunk.key]
        if chunk.leases:
            self._leaving.add(chunk)
        else:
            self._slots.give(chunk.slot)
        if was_ready:
            self._policy.remove(chunk.key)
            self.version += 1
            if self._listener:
                self._listener.removed(chunk)

    # -- proving ----------------------------------------------------------------------------------------------------

    def check(self, fix: bool = False) -> list[str]:
        """Every broken invariant, as a sentence; [] if all is well. O(slots): for tests, idle time and the CLI.

        With `fix`, slots that nobody owns return to the free list. Nothing else can be mended safely.
        """
        faults = []
        owners: dict[int, list[Chunk]] = {}
        for chunk in [*self._chunks.values(), *self._leaving]:
            owners.setdefault(chunk.slot, []).append(chunk)
        faults += [f"slot {slot} has {len(held)} owners" for slot, held in owners.items() if len(held) > 1]
        taken = self._slots.taken()
        faults += [f"slot {slot} is owned but free" for slot in owners.keys() - taken]
        for slot in taken - owners.keys():
            faults.append(f"slot {slot} is taken but nobody owns it")
            if fix:
                self._slots.give(slot)
        for chunk in self._chunks.values():
            if chunk.leases < (1 if chunk.state is State.RESERVED else 0):
                faults.append(f"slot {chunk.slot} is {chunk.state.value} with {chunk.leases} leases")
        faults += [f"slot {c.slot} is leaving without a lease" for c in self._leaving if c.leases < 1]
        held = sum(c.leases for c in [*self._chunks.values(), *self._leaving])
        if held != self.leases:
            faults.append(f"{self.leases} leases are counted and {held} are held")
        ready = {c.key for c in self._chunks.values() if c.state is State.READY}
        if set(self._policy.victims()) != ready:
            faults.append("the policy's keys are not the ready chunks")
        return faults
