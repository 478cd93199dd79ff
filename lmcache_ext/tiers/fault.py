"""Wraps any medium and spoils its work, the same way each time: `fault+file:///a/?fault.flip=0.1&fault.seed=7`.

The faults lie below the runner, where real ones come from, so a tier that runs on top must turn each into a miss.
"""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from random import Random

from lmcache_ext.tiers.base import Parts
from lmcache_ext.tiers.medium import Found, Medium
from lmcache_ext.tiers.urls import Address

_STEP = 0.01  # seconds between two looks whether a hang is over


@dataclass
class Faults:
    """Chances from 0 to 1 for each call, and how long a delay takes. May be changed at any time."""

    seed: int = 0
    error: float = 0.0  # the call raises EIO and does nothing
    short: float = 0.0  # a read brings less than there is; a write stores an object that is cut off
    flip: float = 0.0  # one bit of what is read, or of what is written, turns over
    delay: float = 0.0  # the call takes `delay_s` longer
    delay_s: float = 0.05
    hang: float = 0.0  # the call waits for `heal`, or a minute

    @classmethod
    def from_address(cls, address: Address) -> Faults:
        """From the parameters `fault.<name>`."""
        values = {field.name: address.number(f"fault.{field.name}", field.default) for field in fields(cls)}  # type: ignore[arg-type]
        return cls(**{**values, "seed": int(values["seed"])})  # type: ignore[arg-type]


class Faulty(Medium):
    """`inner` with `faults`. Whether a call is spoilt depends on the seed, the key, the verb and how often it came."""

    def __init__(self, inner: Medium, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults
        self.lasting = inner.lasting
        self.shared, self.bounded, self.batch = inner.shared, inner.bounded, inner.batch
        self.done: Counter[str] = Counter()  # what was spoilt, by kind
        self._calls: Counter[tuple[str, bytes]] = Counter()  # guarded by _lock
        self._lock = threading.Lock()
        self._healed = threading.Event()

    def heal(self) -> None:
        """No more faults, and whatever hangs goes on."""
        self.faults = Faults(self.faults.seed)
        self._healed.set()

    def _spoil(self, verb: str, key: bytes) -> Random:
        """Delay, hang or raise; returns what decides about the rest."""
        with self._lock:
            self._calls[verb, key] += 1
            dice = Random(f"{self.faults.seed} {verb} {key.hex()} {self._calls[verb, key]}")
        if self._strikes(dice, "delay"):
            self._healed.wait(timeout=self.faults.delay_s)
        if self._strikes(dice, "hang"):
            self._healed.wait(timeout=60)
        if self._strikes(dice, "error"):
            raise OSError(errno.EIO, f"made up, in {verb}")
        return dice

    def _strikes(self, dice: Random, what: str) -> bool:
        hit = dice.random() < float(getattr(self.faults, what))
        if hit:
            with self._lock:
                self.done[what] += 1
        return hit

    def open(self) -> None:
        self.inner.open()

    def close(self) -> None:
        self.inner.close()

    def footprint(self, nbytes: int) -> int:
        return self.inner.footprint(nbytes)

    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        dice = self._spoil("write", key)
        if self._strikes(dice, "short"):
            parts = parts[:-1]
        elif self._strikes(dice, "flip"):
            views = [memoryview(bytearray(view)) for view in (header, *parts)]
            _flip(dice, views)
            header, parts = views[0], views[1:]
        self.inner.write(key, header, parts)

    def read(self, key: bytes, header: memoryview, parts: Parts) -> int:
        dice = self._spoil("read", key)
        size = self.inner.read(key, header, parts)
        if self._strikes(dice, "short"):
            if parts:
                parts[-1][:] = bytes(parts[-1].nbytes)
            return size - 1
        if self._strikes(dice, "flip"):
            _flip(dice, [header, *parts])
        return size

    def size(self, key: bytes) -> int | None:
        self._spoil("size", key)
        return self.inner.size(key)

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        for key in keys:
            self._spoil("size", key)
        return self.inner.sizes(keys)

    def remove(self, key: bytes) -> None:
        self._spoil("remove", key)
        self.inner.remove(key)

    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        self._spoil("scan", b"")
        return self.inner.scan(sweep, faults)

    def probe(self, write: bool) -> None:
        self._spoil("probe", b"")
        self.inner.probe(write)


def _flip(dice: Random, views: list[memoryview]) -> None:
    """Turn over one bit of `views`, the header's padding excepted: nobody reads that."""
    filled = [view for view in views if view.nbytes]
    view = dice.choice(filled)
    at = dice.randrange(80 if view is filled[0] else view.nbytes)
    view[at] ^= 1 << dice.randrange(8)
