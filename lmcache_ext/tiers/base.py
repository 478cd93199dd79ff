"""The contract of a tier below host memory: asynchronous, bounded, and never an exception on the way.

Every call that starts something returns the number of a job at once. Each job ends in exactly one `JobResult`, by its
deadline at the latest, with an outcome for every key. A fault is an outcome, too: the caller treats anything but `OK`
as a miss, or as a store that did not happen.

Ownership of buffers. From `submit_store` or `submit_load` until the job's result, its buffers belong to the tier:
nobody else writes them, and those of a load are not read. A result may come while the kernel is still busy with some
buffers, because I/O that hangs can't be called back. Those are named in `JobResult.held`; they stay the tier's until
`freed` returns them, which may be never. The caller leaves their slots out of use until then.
After a load, the buffers of every key that is not `OK` hold anything.
"""

from __future__ import annotations

import ctypes
import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

KEY_BYTES = 32

Parts: TypeAlias = Sequence[memoryview]
"""The memory of one chunk: one contiguous part of bytes for each rank, in rank order. Written as one object."""


class Kind(enum.Enum):
    """What a job does."""

    LOOKUP = "lookup"
    STORE = "store"
    LOAD = "load"
    DELETE = "delete"


class Outcome(enum.Enum):
    """How one key of a job fared."""

    OK = "ok"  # found, stored (or there already), loaded and proven right, deleted (or not there)
    MISS = "miss"  # not there
    EXPIRED = "expired"  # its time is over; deleted
    FOREIGN = "foreign"  # an object of another schema, key or shape lay in its place; deleted
    CORRUPT = "corrupt"  # damaged: header, length or sum is wrong; deleted
    FULL = "full"  # no room, and nothing may leave for it
    REFUSED = "refused"  # too much is queued, or the same key is being written or deleted; try later
    OFF = "off"  # the breaker is open
    FAILED = "failed"  # the medium reported an error
    LATE = "late"  # the deadline passed
    CLOSED = "closed"  # the tier was closed


@dataclass(frozen=True)
class JobResult:
    """The one end of a job."""

    job: int
    kind: Kind
    outcomes: tuple[Outcome, ...]  # one for each key, in the order of the keys
    held: tuple[int, ...] = ()  # indices of keys whose buffers are still in use, see `Tier.freed`
    nbytes: int = 0  # payload that was moved
    seconds: float = 0.0  # since the submission

    @property
    def ok(self) -> list[bool]:
        """Success by key."""
        return [outcome is Outcome.OK for outcome in self.outcomes]

    @property
    def leading(self) -> int:
        """How many keys from the first on are OK: what a chain of chunks can use."""
        for i, outcome in enumerate(self.outcomes):
            if outcome is not Outcome.OK:
                return i
        return len(self.outcomes)


@dataclass
class Counts:
    """What happened since the start. Read a copy through `Tier.counts`."""

    keys: dict[tuple[Kind, Outcome], int] = field(default_factory=dict)  # every key of every result
    stored_bytes: int = 0  # payload
    loaded_bytes: int = 0  # payload of proven loads
    evicted: int = 0  # objects
    used: int = 0  # bytes of the capacity that are spoken for, now
    objects: int = 0  # that a look-up would find, now
    held: int = 0  # buffers still in use after their job's end, now
    trips: int = 0  # how often a breaker opened

    def of(self, kind: Kind, *outcomes: Outcome) -> int:
        """Keys of `kind` that ended in one of `outcomes`; in any, if none is named."""
        return sum(n for (k, o), n in self.keys.items() if k is kind and (not outcomes or o in outcomes))


class Tier(ABC):
    """Chunks kept outside host memory.

    All methods may be called from any thread, take microseconds and do no I/O, except `wait`, `check` and `close`.
    Keys are 32 bytes. Buffers are lists of parts; an object is loaded into parts of the lengths it was stored with.
    Misuse (a key of another length, not as many buffers as keys) raises ValueError; nothing else raises.
    """

    @abstractmethod
    def lookup(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        """Which of `keys` are there? A promise only to try: a later load may still miss.

        Args:
            timeout: seconds until the deadline; None: the tier's own. So for all jobs.
        """

    @abstractmethod
    def submit_store(self, keys: Sequence[bytes], buffers: Sequence[Parts], timeout: float | None = None) -> int:
        """Write chunks. Never waits: keys that find the queue full are refused, the first keys are taken first."""

    @abstractmethod
    def submit_load(self, keys: Sequence[bytes], buffers: Sequence[Parts], timeout: float | None = None) -> int:
        """Read chunks. For a pipeline chunk by chunk, submit one job for each chunk."""

    @abstractmethod
    def delete(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        """Forget `keys`: no look-up from now on finds them. Their space comes back with the job's result, or with the
        last load of them that is under way. What can't be removed now is removed later.
        """

    @abstractmethod
    def poll(self) -> list[JobResult]:
        """Results since the last call. Also what enforces deadlines: call it at every step."""

    @abstractmethod
    def freed(self) -> list[tuple[int, int]]:
        """(job, index of key) of held buffers that came back since the last call."""

    @abstractmethod
    def wait(self, timeout: float) -> bool:
        """Block until `poll` has something, at most `timeout` seconds. For tests, tools and helper threads."""

    def holds(self, key: bytes) -> bool:
        """Whether `key` is there for all that is known here, and `left` would name it if it went. False where others
        may remove it."""
        return False

    def left(self) -> tuple[list[bytes], bool]:
        """Keys that are not there any more and were at the last call, evicted, deleted or damaged; and whether there
        were too many to remember all."""
        return [], False

    @abstractmethod
    def counts(self) -> Counts:
        """A copy of the counters."""

    @abstractmethod
    def check(self, fix: bool = False) -> list[str]:
        """Every fault found, as a sentence; [] if all is well. Does I/O: O(objects), names and sizes only.

        With `fix`, leftovers are removed, and what the tier believes is made to agree with what is there.
        """

    @abstractmethod
    def close(self, timeout: float) -> bool:
        """End all jobs (`poll` still returns their results), wait at most `timeout` seconds for I/O under way.

        Returns whether all I/O has ended; if not, held buffers stay in use.
        """


def view_at(address: int, nbytes: int) -> memoryview:
    """The `nbytes` bytes at `address` of this process, writable. The caller keeps the memory mapped meanwhile."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def address_of(view: memoryview) -> int:
    """Where a contiguous view begins; 0 if it is empty."""
    return int(np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0]) if view.nbytes else 0
