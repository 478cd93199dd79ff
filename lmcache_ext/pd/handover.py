"""One request on its way to one receiver, as its sender sees it.

begun ──▶ asked ──slots──▶ open ──every chunk taken──▶ STORED
  └──────────┴───────────────┴── anything else ──▶ ended, and gone once nothing of it is read or in flight

a chunk:  ready ──sum──▶ queued ──transfer──▶ written ──its sum proved at the receiver──▶ taken
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from dataclasses import dataclass, field

from lmcache_ext.pd.wire import Geometry


class Outcome(enum.Enum):
    """How a hand-over ended."""

    STORED = "stored"  # every chunk is visible at the receiver
    CANCELLED = "cancelled"
    FULL = "full"  # the receiver had no slots in time
    DEAD = "dead"  # the receiver does not answer, or has ended
    REFUSED = "refused"  # it does not want this, see the event's text
    TIMEOUT = "timeout"  # something took longer than it may
    CORRUPT = "corrupt"  # what arrived is not what was sent
    BROKEN = "broken"  # a transfer failed
    LOST = "lost"  # the sender will never have all of it


@dataclass(frozen=True)
class Target:
    """Rank `rank` of `ranks` of a decode engine: where its `Receiver` listens."""

    host: str
    init_port: int
    alloc_port: int
    rank: int = 0
    ranks: int = 1


class Together:
    """Several hand-overs, of one request, of which the proxy hears as of one. From any thread.

    Args:
        count: how many there are.
        ranks: those that the proxy is told of, once the last has succeeded or one has not.
    """

    def __init__(self, count: int, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self._left = count
        self._failed = False
        self._lock = threading.Lock()

    def ended(self, stored: bool) -> bool:
        """One of them is over. True: that is to be told."""
        with self._lock:
            self._left -= 1
            if stored:
                return not self._left and not self._failed
            told, self._failed = self._failed, True
            return not told


@dataclass(frozen=True)
class Released:
    """The bytes of a chunk are not needed any more: its slot may be written. Comes once for each `ready`."""

    req_id: str
    index: int
    slot: int


@dataclass(frozen=True)
class Ended:
    """A hand-over's end. Comes once for each `begin`; some chunks may be released later."""

    req_id: str
    outcome: Outcome
    text: str
    sent: int  # chunks that were written and taken
    skipped: int  # chunks that were there already


Event = Released | Ended


@dataclass(eq=False)
class Handover:
    """Owned by the sender's thread."""

    number: int
    req_id: str
    target: Target
    keys: list[bytes]
    last_tokens: int  # of the last chunk
    due: float  # given up unless something happens before
    together: Together | None = None  # with others of its request
    asked: bool = False
    retried: bool = False  # with a second session, because the receiver had forgotten the first
    places: list[int] | None = None  # the receiver's slots
    slots: dict[int, int] = field(default_factory=dict)  # our slot of each chunk that is ready and not released
    summing: set[int] = field(default_factory=set)
    sums: dict[int, bytes] = field(default_factory=dict)
    queued: deque[int] = field(default_factory=deque)  # chunks with a sum, to be written
    flying: set[int] = field(default_factory=set)
    unanswered: set[int] = field(default_factory=set)  # written, not taken yet
    answer_due: float = 0.0
    left: set[int] = field(default_factory=set)  # not taken yet, nor there already
    lost: set[int] = field(default_factory=set)  # chunks that will never be ready
    why: str = ""  # they will not
    skipped: int = 0
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.left = set(range(len(self.keys)))

    @property
    def still(self) -> bool:
        """Whether nothing reads its slots."""
        return not self.summing and not self.flying

    def tokens(self, index: int, geometry: Geometry) -> int:
        """Tokens of a chunk."""
        return geometry.chunk_tokens if index < len(self.keys) - 1 else self.last_tokens

    def nbytes(self, index: int, geometry: Geometry) -> int:
        """Bytes of a chunk in our slot."""
        return geometry.nbytes(self.tokens(index, geometry))

    def next_batch(self, geometry: Geometry, limit: int) -> list[int]:
        """Take the chunks of one transfer from the queue: full ones up to `limit` bytes, or one that is partial; one
        at least."""
        batch: list[int] = []
        total = 0
        while self.queued:
            nbytes = self.nbytes(self.queued[0], geometry)
            partial = nbytes < geometry.slot_bytes
            if batch and (partial or total + nbytes > limit):
                break
            index = self.queued.popleft()
            if index in self.left:  # else it is there already
                batch.append(index)
                total += nbytes
                if partial:
                    break
        return batch
