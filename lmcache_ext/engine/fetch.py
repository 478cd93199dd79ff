"""One request's chunks on their way from tiers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmcache_ext.engine.below import Want
from lmcache_ext.engine.directory import Chunk
from lmcache_ext.tracing import Span


@dataclass(slots=True)
class Leg:
    """One fetch's loads from one level."""

    loads: int = 0  # under way
    nbytes: int = 0  # that came
    seconds: float = 0.0  # with loads under way, up to `since`
    since: float = 0.0

    def begin(self, now: float) -> None:
        """One load more."""
        if not self.loads:
            self.since = now
        self.loads += 1

    def end(self, now: float, nbytes: int) -> None:
        """One load less, which brought so much."""
        self.loads -= 1
        self.nbytes += nbytes
        self.seconds, self.since = self.seconds + now - self.since, now

    @property
    def rate(self) -> float:
        """Bytes/s; 1 at least."""
        return max(self.nbytes / max(self.seconds, 1e-6), 1.0)


@dataclass
class Fetch:
    """One request's chunks on their way into L1: `wants[:done]` are ready and held, those up to `sent` are on their way
    or were there, those up to `end` have no place yet, and the rest is not waited for."""

    wants: Sequence[Want]
    give_up: float
    span: Span
    where: list[int | None]  # the level that has each
    legs: list[Leg]  # by level
    looking: bool = True
    over: bool = False
    done: int = 0
    sent: int = 0
    end: int = 0
    held: dict[int, Chunk] = field(default_factory=dict)
    before: list[Chunk] = field(default_factory=list)  # the first want, and held as well
    came: int = 0  # loads that went well
    began: float = 0.0  # when all look-ups had ended

    @property
    def loads(self) -> int:
        """How many are under way."""
        return sum(leg.loads for leg in self.legs)

    def looked(self, i: int, asked: Sequence[int], ok: Sequence[bool]) -> None:
        """Level `i` has those of the wants that it was `asked` for which are `ok`."""
        for n, found in zip(asked, ok, strict=True):
            if found:
                self.where[n] = i

    def begin(self, end: int) -> None:
        """All look-ups have ended; this is waited for."""
        self.looking, self.end, self.began = False, end, time.monotonic()

    def cut(self, n: int) -> None:
        """Want `n` does not come."""
        self.end = min(self.end, n)

    def arrived(self, n: int, i: int, ok: bool, nbytes: int) -> None:
        """The load of want `n` from level `i` has ended."""
        self.legs[i].end(time.monotonic(), nbytes)
        self.came += ok
        if not ok:
            self.cut(n)

    def finish(self) -> None:
        """Nobody waits for it any more."""
        if not self.over:
            self.over = True
            self.span.end(found=sum(where is not None for where in self.where), came=self.done)

    def soon(self) -> tuple[Sequence[Want], float]:
        """As `Lower.soon`."""
        loads = self.loads
        if self.over or self.looking or self.sent < self.end or not (self.came and loads):
            return (), 0.0
        return self.wants[self.done : self.end], (time.monotonic() - self.began) / self.came * loads
