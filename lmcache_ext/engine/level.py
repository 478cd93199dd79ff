"""One tier, as the chain below L1 sees it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from lmcache_ext.engine.directory import Chunk
from lmcache_ext.engine.shelf import Shelf
from lmcache_ext.tiers import Tier
from lmcache_ext.tracing import Trace


@dataclass(slots=True)
class Offer:
    """A chunk to be written back. Not held: it may be evicted first."""

    chunk: Chunk
    trace: Trace
    due: int  # levels that have not dealt with it
    stored: bool = False  # in one of them


@dataclass
class Level:
    """One tier, what was learnt of it, and what it has to do."""

    kind: str  # "disk", "gds" or "remote", as in the metrics' names
    tier: Tier
    reads: bool = True
    writes: bool = True
    rate: float = 0.0  # bytes/s that fetches reached; 0: not known yet
    tried: float = 0.0  # when the last load began
    shelf: Shelf | None = None  # what routers know of it; None: they hear nothing
    waiting: deque[Offer] = field(default_factory=deque)  # for a place, the oldest first
    writing: int = 0  # write-backs under way
    fetching: int = 0  # loads under way
