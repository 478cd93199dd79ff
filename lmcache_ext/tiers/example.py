"""The smallest honest tier: a dictionary. Copy it to write your own, and see docs/tiers.md.

A medium keeps whole objects and blocks as long as it likes. It need not check, count, queue, time out or evict.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from lmcache_ext.tiers.base import Parts
from lmcache_ext.tiers.medium import MEDIA, Found, Medium
from lmcache_ext.tiers.urls import Address


@MEDIA.register("example")
class Example(Medium):
    """Objects in this process' memory: `example://`."""

    def __init__(self) -> None:
        self._objects: dict[bytes, tuple[bytes, float]] = {}

    @classmethod
    def from_address(cls, address: Address) -> Example:
        """No parameters."""
        return cls()

    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        self._objects[key] = (b"".join([header, *parts]), time.time())

    def read(self, key: bytes, header: memoryview, parts: Parts) -> int:
        if key not in self._objects:
            raise FileNotFoundError(key.hex())
        data = memoryview(self._objects[key][0])
        at = 0
        for view in (header, *parts):
            there = data[at : at + view.nbytes]
            view[: there.nbytes] = there
            at += view.nbytes
        return len(data)

    def size(self, key: bytes) -> int | None:
        return len(self._objects[key][0]) if key in self._objects else None

    def remove(self, key: bytes) -> None:
        self._objects.pop(key, None)

    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        for key, (data, when) in list(self._objects.items()):
            yield Found(key, len(data), when)

    def probe(self, write: bool) -> None:
        pass  # a dictionary always works
