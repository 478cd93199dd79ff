"""A medium in memory with a latency and a rate that a test chooses, and the same each time."""

from __future__ import annotations

import threading

from lmcache_ext.tiers.base import Parts
from lmcache_ext.tiers.example import Example
from lmcache_ext.tiers.medium import MEDIA
from lmcache_ext.tiers.urls import Address


@MEDIA.register("fake")
class Fake(Example):
    """`fake://?latency=0.001&gb_per_s=2`: each call takes `latency` seconds and then `gb_per_s`, in each thread."""

    def __init__(self, latency: float = 0.0, gb_per_s: float = 0.0) -> None:
        super().__init__()
        self.latency = latency  # may be changed at any time
        self.gb_per_s = gb_per_s  # 10^9 bytes; 0: no limit
        self._closed = threading.Event()

    @classmethod
    def from_address(cls, address: Address) -> Fake:
        return cls(address.number("latency"), address.number("gb_per_s"))

    def close(self) -> None:
        self._closed.set()

    def _take_time(self, nbytes: int) -> None:
        seconds = self.latency + (nbytes / self.gb_per_s / 1e9 if self.gb_per_s else 0)
        if seconds:
            self._closed.wait(timeout=seconds)

    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        self._take_time(sum(part.nbytes for part in parts))
        super().write(key, header, parts)

    def read(self, key: bytes, header: memoryview, parts: Parts) -> int:
        self._take_time(sum(part.nbytes for part in parts))
        return super().read(key, header, parts)

    def size(self, key: bytes) -> int | None:
        self._take_time(0)
        return super().size(key)

    def remove(self, key: bytes) -> None:
        self._take_time(0)
        super().remove(key)
