"""The contract of an eviction policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from lmcache_ext.registry import Registry


class EvictionPolicy(ABC):
    """Orders keys by who should leave first.

    Called from the directory's one thread; nothing here blocks, sleeps or does I/O. Every method is O(1), apart from
    walking past entries that the caller refuses in `victims`. The policy knows keys only: whether a key may leave now
    is the directory's business.
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
        """Known keys, best victim first. The caller stops early and changes nothing while it walks."""

    @abstractmethod
    def __len__(self) -> int:
        """How many keys are known."""


POLICIES: Registry[type[EvictionPolicy]] = Registry("cache_policy")
