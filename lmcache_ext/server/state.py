"""What the server is told at its start, and what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmcache_ext.engine import Level


class Refused(Exception):
    """A request can't be carried out."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Setup:
    """How the server is set up, apart from where it listens."""

    nbytes: int
    extent_bytes: int
    policy: str = "LRU"
    chunk_size: int = 256
    silence: float = 5.0  # seconds
    only_faster: bool = False
    levels: Sequence[Level] = ()
    names: Sequence[str] = ()  # of the levels, for people


@dataclass
class Tally:
    """What happened since the start."""

    requests: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    lookups: int = 0
    lookup_chunks: int = 0
    hit_chunks: int = 0
    stored_chunks: int = 0
    stored_bytes: int = 0
    leased_chunks: int = 0
    leased_bytes: int = 0
    failed_stores: int = 0
    refused_stores: int = 0
    quarantined: int = 0
    proven_dead: int = 0
