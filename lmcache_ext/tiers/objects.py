"""One object at a time, blocking: store it, load and prove it, delete it. What the runner's threads call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from lmcache_ext.tiers.base import Outcome, Parts
from lmcache_ext.tiers.header import BLOCK, Header, digest, encode, examine
from lmcache_ext.tiers.index import Index
from lmcache_ext.tiers.medium import Medium
from lmcache_ext.tiers.serde import Serde

Done = tuple[Outcome, int]
"""How it went, and the bytes of payload that were moved: 0 if the medium was not needed."""


class Objects:
    """Keeps medium and index in step. Thread-safe. Methods raise what the medium raises; nothing is left half done."""

    def __init__(self, medium: Medium, index: Index, ttl: float, serde: Serde) -> None:
        self._medium = medium
        self._index = index
        self._ttl = ttl
        self._serde = serde

    def ask(self, keys: Sequence[bytes]) -> list[Done]:
        """Are objects that the index does not know on the medium?"""
        sizes = self._medium.sizes(keys)
        if not self._index.keeps:
            return [(Outcome.MISS if size is None else Outcome.OK, 0) for size in sizes]
        for key, size in zip(keys, sizes, strict=True):
            if size is not None:
                self.enter(key, size, time.time())
        self.trim()
        return [(verdict or Outcome.MISS, 0) for verdict in self._index.find(keys, time.time())]

    def enter(self, key: bytes, size: int, when: float, expires: float = 0.0) -> None:
        """An object of `size` bytes, header included, was found. `trim` soon afterwards."""
        if not expires and self._ttl:
            expires = when + self._ttl  # the header says it exactly, once it is read
        self._index.adopt(key, self._medium.footprint(size), when, expires)

    def trim(self) -> None:
        """Remove what is beyond the capacity."""
        for key in self._index.surplus():
            with contextlib.suppress(Exception):
                self.remove(key)

    def retry(self) -> list[bytes]:
        """Try again to remove what could not be removed; returns what could not."""
        keys = self._index.claim_stuck()
        for key in keys:
            with contextlib.suppress(Exception):
                self.remove(key)
        return keys

    def store(self, key: bytes, parts: Parts, header: memoryview) -> Done:
        """Write one object; removes its victims first. Without an index: unless somebody has written it already."""
        now = time.time()
        if self._index.find([key], now)[0] is Outcome.EXPIRED:
            self.discard(key)
        nbytes, coded = sum(part.nbytes for part in parts), self._serde.nbytes(parts)
        expires = now + self._ttl if self._ttl else 0.0
        size = self._medium.footprint(BLOCK + coded)
        grant = self._index.reserve(key, size, expires, now)
        if grant is Outcome.FULL and self.retry():
            grant = self._index.reserve(key, size, expires, now)
        if isinstance(grant, Outcome):
            return grant, 0
        try:
            if not self._index.keeps and self._medium.size(key) == BLOCK + coded:
                self._index.abort(grant)
                return Outcome.OK, 0
            for victim in list(grant.victims):
                self._medium.remove(victim)
                self._index.gone(victim, grant)
            stored = self._serde.encode(key, parts)
            encode(header, key, stored, expires)
            self._medium.write(key, header, stored)
        except BaseException:
            self._index.abort(grant)
            raise
        if self._index.commit(key):
            self.remove(key)
        return Outcome.OK, nbytes

    def load(self, key: bytes, parts: Parts, header: memoryview, unknown: bool) -> Done:
        """Read one object and prove it. `unknown`: also try what the index does not know."""
        now = time.time()
        known = self._index.pin(key, now)
        if known is Outcome.EXPIRED:
            self.discard(key)
        if known is not Outcome.OK and (known is not None or not unknown):
            return known or Outcome.MISS, 0
        try:
            found = self._read(key, parts, header, now)
        except BaseException:
            self._let_go(key, known is not None, None)
            raise
        self._let_go(key, known is not None, found)
        if isinstance(found, Outcome):
            return found, 0
        if known is None:
            self.enter(key, BLOCK + found.nbytes, now, found.expires)
            self.trim()
        return Outcome.OK, sum(part.nbytes for part in parts)

    def _read(self, key: bytes, parts: Parts, header: memoryview, now: float) -> Header | Outcome:
        header[:] = bytes(BLOCK)
        room = self._serde.room(parts)
        try:
            size = self._medium.read(key, header, room)
        except FileNotFoundError:
            return Outcome.MISS
        found = examine(header, size, key, [part.nbytes for part in room], now)
        if not isinstance(found, Header):
            return found
        if digest(room) != found.digest:
            return Outcome.CORRUPT
        decoded = self._serde.decode(key, room, parts)
        return found if decoded is Outcome.OK else decoded

    def _let_go(self, key: bytes, pinned: bool, found: Header | Outcome | None) -> None:
        """The read is over. What it proved useless goes; None: it proved nothing."""
        useless = isinstance(found, Outcome)
        with contextlib.suppress(Exception):  # the removal failed: remembered, and tried again later
            if not pinned:
                if useless:
                    self._medium.remove(key)
                return
            if useless:
                self._index.leave(key)
            if self._index.unpin(key, found.expires if isinstance(found, Header) else None):
                self.remove(key)

    def discard(self, key: bytes) -> None:
        """Make sure that `key` is neither found nor there."""
        if self._index.leave(key):
            self.remove(key)

    def delete(self, key: bytes, known: bool) -> Done:
        """The blocking half of a deletion: if `known`, the index has let go of it already."""
        if known:
            self.remove(key)
        else:
            self._medium.remove(key)
            self.discard(key)  # a scan may have found it meanwhile
        return Outcome.OK, 0

    def remove(self, key: bytes) -> None:
        """Free the bytes of an object that the index has marked as leaving, for us to remove."""
        try:
            self._medium.remove(key)
        except BaseException:
            self._index.stay(key)
            raise
        self._index.gone(key)
