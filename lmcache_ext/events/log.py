"""The event log of one engine."""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol


class Tier(str, enum.Enum):
    """Tier names that Dynamo 1.4.2 and 1.6.1 both understand."""

    CPU = "CPU"
    DISK = "DISK"


@dataclass(frozen=True)
class Announcement:
    """What a router must know of a chunk: the engine's own block hashes, so that our events and its events agree."""

    block_hashes: tuple[bytes, ...]  # one per engine block of the chunk
    parent_hash: bytes | None  # of the block before
    token_ids: Sequence[int]  # kept for as long as the chunk: compact, please
    block_size: int  # tokens
    lora_id: int | None
    lora_name: str | None
    salt: str | None


class Noted(Protocol):
    """Anything that a tier holds: its note says what to tell of it."""

    @property
    def note(self) -> object:
        """An Announcement, or anything else for silence."""


@dataclass(frozen=True)
class Told:
    """A chunk that routers know of. `at`: since when, as whoever holds it counts."""

    note: Announcement
    at: int = 0


@dataclass(frozen=True)
class Event:
    """A chunk became visible in a tier, or left it."""

    stored: bool
    tier: Tier
    what: Announcement


class EventLog:
    """A directory's listener. Chunks whose note is no Announcement (events are off, or theirs are not indexable) pass
    in silence. Bounded: nobody takes, nothing is kept. Who has much to take back does it in slices, as there is `room`.

    Two chunks may hold one block: a partial chunk and the fuller one that replaces it, or chunks of requests with
    different tags. Routers don't count, so a block is removed when the last chunk that holds it goes."""

    def __init__(self, tier: Tier, limit: int = 100_000) -> None:
        self._tier = tier
        self._limit = limit
        self._events: deque[Event] = deque()  # one thread takes while another adds
        self._holders: Counter[bytes] = Counter()  # by block hash: how many chunks
        self.dropped = 0

    @property
    def room(self) -> int:
        """How many more events it takes now."""
        return max(0, self._limit - len(self._events))

    def stored(self, chunk: Noted) -> None:
        """A chunk is ready."""
        if isinstance(what := chunk.note, Announcement):
            self._holders.update(what.block_hashes)
            self._add(True, what)

    def removed(self, chunk: Noted) -> None:
        """A chunk is gone."""
        if isinstance(what := chunk.note, Announcement):
            gone = tuple(block for block in what.block_hashes if self._let_go(block))
            if gone:
                self._add(False, replace(what, block_hashes=gone))

    def announce(self, chunks: Iterable[Noted]) -> None:
        """Say again what is resident: somebody's view was cleared."""
        for chunk in chunks:
            if isinstance(chunk.note, Announcement):
                self._add(True, chunk.note)

    def take(self) -> list[Event]:
        """Events since the last call, oldest first."""
        return [self._events.popleft() for _ in range(len(self._events))]

    def _let_go(self, block: bytes) -> bool:
        """Whether no chunk holds it any more."""
        self._holders[block] -= 1
        if self._holders[block] > 0:
            return False
        del self._holders[block]
        return True

    def _add(self, stored: bool, what: Announcement) -> None:
        if len(self._events) >= self._limit:
            self.dropped += 1
            return
        self._events.append(Event(stored, self._tier, what))
