"""What an engine's scheduler side wants of whatever brings chunks that its directory lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lmcache_ext.engine.directory import Chunk
from lmcache_ext.events import Noted
from lmcache_ext.metrics import Recorder
from lmcache_ext.tracing import NO_TRACE, Trace


@dataclass(frozen=True)
class Want:
    """A chunk that a request could use."""

    key: bytes
    tokens: int
    note: object = None


class Below(Protocol):
    """What brings chunks that the directory lacks."""

    def poll(self) -> None:
        """Called every step."""

    @property
    def busy(self) -> bool:
        """Whether it has to be polled even if there is no request."""

    def offer(self, chunks: Sequence[Chunk], trace: Trace = NO_TRACE) -> None:
        """These are ready, or were used again."""

    def knows(self, owner: str) -> bool:
        """Whether something is being brought for this request."""

    def fetch(
        self, owner: str, wants: Sequence[Want], patience: float, trace: Trace = NO_TRACE, after: Sequence[bytes] = ()
    ) -> bool:
        """Bring what can be had of `wants`, whose first are looked for first. True: it is under way, ask again, with no
        wants; at most `patience` seconds. What came is held until `release`.

        Args:
            after: keys of what precedes them, and is ready: it is of no less use, and stays until then, too.
        """

    def soon(self, owner: str) -> tuple[Sequence[Want], float]:
        """What this request still waits for, if all of it is on its way, and seconds until it has probably come."""

    def release(self, owner: str) -> None:
        """The request has leased what it uses, or is gone."""

    def chunks(self) -> Sequence[Noted]:
        """All that it has told routers of."""

    def measure(self, recorder: Recorder) -> None:
        """Bring gauges up to date."""

    def close(self, timeout: float) -> None:
        """The engine ends."""
