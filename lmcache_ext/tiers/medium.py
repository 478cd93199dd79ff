"""What holds the bytes of a tier: blocking calls on whole objects. `example.py` is the one to copy.

A tier is a `Runner` over a medium. The runner has the threads, queues, deadlines, breakers, capacity, eviction and the
proof that what comes back is what was stored; a medium moves bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lmcache_ext.errors import ConfigError
from lmcache_ext.registry import Registry
from lmcache_ext.tiers.base import Parts
from lmcache_ext.tiers.urls import Address


class Found(NamedTuple):
    """One object that a scan came by."""

    key: bytes
    nbytes: int  # of the whole object, its header included
    when: float  # seconds since 1970 of its last change, for the order of eviction


class Medium(ABC):
    """Holds objects: a header of 4096 bytes and a payload in parts, under a key of 32 bytes.

    Called from several of the runner's threads at once, between `open` and `close`; `close` comes when no call is under
    way. Calls block, let go of the GIL while they do, and raise OSError (or anything that is an Exception) for a fault.
    With one key several reads may run at once, and, seldom, the removal of an object that the runner did not know
    beside a write: then either may win, as long as what can be read is one whole object.
    """

    lasting = False
    """Objects outlive the process: the runner scans at its start, and again when the medium comes back."""

    shared = False
    """Others write here, too: the medium is asked about keys that the runner does not know."""

    bounded = False
    """Whoever runs it bounds it, and it drops objects as it likes (a redis with maxmemory). Together with `shared`: the
    runner keeps no index, counts and evicts nothing, and asks the medium each time, unless the user gives a capacity.
    """

    batch = 1
    """How many keys go into one call of `sizes`. More only where that takes less time than a call for each."""

    @classmethod
    def from_address(cls, address: Address) -> Medium:
        """One that is not opened yet; takes its parameters from `address`. Raises ConfigError."""
        raise ConfigError("url", address.shown, f"{cls.__name__} can't be opened by URL")

    def open(self) -> None:  # noqa: B027 - most have nothing to do
        """Get ready. The only call that may raise ConfigError; made in the thread that opens the tier."""

    def close(self) -> None:  # noqa: B027
        """Let go of connections and descriptors."""

    def footprint(self, nbytes: int) -> int:
        """How much of the capacity an object of `nbytes` takes, header included. Pure arithmetic."""
        return nbytes

    @abstractmethod
    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        """Store an object; it becomes visible complete or not at all, and replaces what was there.

        On a fault nothing may be left behind. `header` begins on a memory page.
        """

    @abstractmethod
    def read(self, key: bytes, header: memoryview, parts: Parts) -> int:
        """Fill `header`, then `parts`, from the object's beginning. Returns the bytes of the whole object.

        If they are not those of `header` and `parts` together, only as much of `header` as there is must be filled.
        Need not verify anything. Raises FileNotFoundError if there is no such object.
        """

    @abstractmethod
    def size(self, key: bytes) -> int | None:
        """Bytes of the whole object, or None if there is none."""

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        """`size` of each of at most `batch` keys."""
        return [self.size(key) for key in keys]

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """Delete the object; when this returns, its space is free. Absent is fine."""

    @abstractmethod
    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        """All objects, in any order, from names and sizes alone.

        Appends a sentence to `faults` for everything that belongs to nobody; with `sweep`, removes what provably is
        a dead writer's. A medium that can't list yields nothing.
        """

    @abstractmethod
    def probe(self, write: bool) -> None:
        """Find out, cheaply, whether reads (or writes) work again. Raises if not."""


MEDIA: Registry[type[Medium]] = Registry("tier")
