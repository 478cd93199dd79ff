"""The contract of an eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from lmcache_ext.registry import Registry


class EvictionPolicy(ABC):
    """Orders keys by who should leave first.

    Called from the directory's one thread; nothing here blocks, sleeps or does I/O. Every method is O(1) amortized,
    apart from walking past entries that the caller refuses in `victims`. The policy knows keys only: whether a key may
    leave now is the directory's business. Memory is O(most keys ever known at once), ghosts included.

    What a policy may assume of its caller, for a request that stores and finds chunks of one chain:

    - `insert` comes head first, in the order of the chain, and may come after the request has ended;
    - a request that ends touches its whole chain, last chunk first, so a chunk's own writer touches it at most once.
      Hence the first touch after `insert` shows no reuse, and the second one does;
    - a request that finds a chunk touches it two or three times: counts are about triple, for all alike.
    """

    @abstractmethod
    def insert(self, key: bytes) -> None:
        """A key became ready. It is not known yet."""

    @abstractmethod
    def touch(self, key: bytes) -> None:
        """A known key was used."""

    @abstractmethod
    def remove(self, key: bytes) -> None:
        """A known key left, by eviction or otherwise."""

    @abstractmethod
    def victims(self) -> Iterator[bytes]:
        """Known keys, each once, best victim first. The caller stops early and changes nothing while it walks.

        A policy may first do work that it had put off, as long as asking twice gives the same answer twice. What it
        offers after a refusal need only be sensible: refusals are leased chunks, few and for milliseconds.
        """

    @abstractmethod
    def __len__(self) -> int:
        """How many keys are known."""


POLICIES: Registry[type[EvictionPolicy]] = Registry("cache_policy")
