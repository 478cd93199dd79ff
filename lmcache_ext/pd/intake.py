"""What one session of a sender has in a receiver's store: requests, their places, and who may still write there.

asked ──places──▶ open ──every chunk proved──▶ over
  │                ├──stall, silence──▶ abandoned ──the sender's word, proof of its end──▶ over
  └──wait is over─▶ refused
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lmcache_ext.pd.parts import Plan
from lmcache_ext.pd.store import Place, Store, Ticket
from lmcache_ext.pd.wire import AllocRequest, Geometry, Identity


@dataclass(eq=False)
class Intake:
    """One request that has places. `due` is when it is given up unless something comes."""

    number: int
    req_id: str
    tokens: list[int]
    places: list[Place]
    due: float
    left: dict[int, Ticket] = field(default_factory=dict)  # chunks that are not here yet; also bad and abandoned ones
    abandoned: bool = False

    def __post_init__(self) -> None:
        self.left = {i: place.ticket for i, place in enumerate(self.places) if place.ticket is not None}

    def abandon(self, store: Store) -> None:
        """Nothing of what is not here yet will be seen; its slots stay taken."""
        if not self.abandoned:
            self.abandoned = True
            for ticket in self.left.values():
                store.abandon(ticket)
            store.claim(self.req_id)  # what is there already may stay, but nothing is kept for it

    def give_back(self, store: Store) -> None:
        """Nobody writes there any more."""
        for ticket in self.left.values():
            store.give_back(ticket)
        self.left.clear()


@dataclass(eq=False)
class Session:
    """One connection of a sender. Owned by the receiver's thread."""

    token: bytes
    plan: Plan
    peer: Identity
    here: bool  # on this machine, so that its end can be proved
    route: bytes | None = None  # ZMQ's name of its connection
    pidfd: int | None = None
    heard: float = 0.0  # monotonic
    silent_since: float | None = None
    drain: int | None = None  # ticks until bytes that its sockets left behind have surely arrived; None: not gone
    highest: int = -1  # number of a request so far
    closed: bool = False  # its agent is no more; only its last words count
    intakes: dict[int, Intake] = field(default_factory=dict)

    @property
    def gone(self) -> bool:
        """Whether it can't send any more."""
        return self.drain is not None

    def abandon(self, store: Store) -> None:
        """Nothing of what is not here yet will be seen."""
        for intake in self.intakes.values():
            intake.abandon(store)

    def give_back(self, store: Store) -> None:
        """It writes nothing any more."""
        for intake in self.intakes.values():
            intake.give_back(store)
        self.intakes.clear()

    def stalled(self, now: float) -> Iterator[Intake]:
        """Requests for which nothing has come for too long."""
        return (intake for intake in self.intakes.values() if intake.due <= now and not intake.abandoned)


@dataclass(eq=False)
class Waiting:
    """A request for which there was no room yet."""

    session: Session
    ask: AllocRequest
    tokens: list[int]
    until: float


def tokens_of(ask: AllocRequest, geometry: Geometry, slots: int) -> list[int] | None:
    """Tokens of each chunk of a request; None if it can't be meant."""
    keys = ask.keys
    good = 1 <= len(keys) <= slots and 1 <= ask.last_chunk_toks <= geometry.chunk_tokens
    if not good or len(set(keys)) < len(keys) or any(len(key) != 32 for key in keys):
        return None
    return [geometry.chunk_tokens] * (len(keys) - 1) + [ask.last_chunk_toks]


def placed(waiting: Waiting, store: Store, stall_s: float) -> Intake | None:
    """`waiting` with places, if the store has them now."""
    ask, plan = waiting.ask, waiting.session.plan
    places = store.reserve(ask.req_id, plan.writer, plan.writers, ask.keys, waiting.tokens)
    if places is None:
        return None
    return Intake(ask.number, ask.req_id, waiting.tokens, places, time.monotonic() + stall_s)


def indexes(places: Sequence[Place]) -> tuple[list[int], list[int]]:
    """(slot of each chunk, which of them are there already)"""
    return [place.slot for place in places], [i for i, place in enumerate(places) if place.ticket is None]
