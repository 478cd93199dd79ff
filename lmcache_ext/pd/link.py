"""One receiver as a sender sees it: a session there, what is in flight, and whether it is worth asking."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field

import zmq

from lmcache_ext.errors import TransferError
from lmcache_ext.pd import identity, wire
from lmcache_ext.pd.agent import Agent, Memory, Remote, Transfer
from lmcache_ext.pd.handover import Handover, Target
from lmcache_ext.pd.options import SenderOptions
from lmcache_ext.pd.parts import Misfit, Plan
from lmcache_ext.pd.ports import connect
from lmcache_ext.tiers.breaker import Breaker


@dataclass(eq=False)
class Flight:
    """One transfer of chunks of one request."""

    transfer: Transfer
    handover: Handover
    indexes: list[int]
    deadline: float


@dataclass(eq=False)
class Session:
    """What a receiver granted."""

    token: bytes
    remote: Remote
    pidfd: int | None  # None: it is elsewhere


@dataclass(eq=False)
class Link:
    """Owned by the sender's thread. The alloc socket outlives sessions: questions after old ones are answered there."""

    target: Target
    plan: Plan
    breaker: Breaker
    alloc: zmq.Socket[bytes]
    init: zmq.Socket[bytes] | None = None  # while a session is asked for
    init_due: float = 0.0
    probing: bool = False
    session: Session | None = None
    heard: float = 0.0
    used: float = 0.0
    flights: deque[Flight] = field(default_factory=deque)
    handovers: dict[int, Handover] = field(default_factory=dict)

    @property
    def flying_bytes(self) -> int:
        """In flight."""
        return sum(flight.transfer.nbytes for flight in self.flights)

    def say(self, message: wire.FromSender) -> None:
        """Send, or lose it: every answer has a deadline."""
        try:
            self.alloc.send_multipart(wire.sealed(message), zmq.NOBLOCK)
        except zmq.ZMQError:
            return

    def ask(self, context: zmq.Context[zmq.Socket[bytes]], geometry: wire.Geometry, options: SenderOptions) -> None:
        """Ask for a session, on a connection of its own, so that no late answer to an earlier question is heard."""
        self.init = connect(context, zmq.DEALER, self.target.host, self.target.init_port)
        self.init_due = time.monotonic() + options.connect_s
        question = wire.NixlInitRequest(wire.VERSION, identity.own(), geometry)
        self.init.send_multipart([b"", *wire.sealed(question)], zmq.NOBLOCK)

    def open(self, agent: Agent, answer: wire.NixlInitResponse) -> None:
        """Take what the receiver granted.

        Raises:
            TransferError: it can't be.
            Misfit: the receiver is another rank than we were told.
        """
        if answer.geometry != self.plan.receiver:
            raise Misfit(f"its slots are {answer.geometry}, and should be {self.plan.receiver}")
        good = answer.version == wire.VERSION and len(answer.session) == wire.SESSION_BYTES
        good = good and answer.slots > 0 and answer.base > 0 and answer.device in ("cpu", "cuda")
        if not good or len(answer.remote_meta_bytes) > wire.MAX_META:
            raise TransferError("the receiver's answer makes no sense")
        pidfd = None
        if identity.same_machine(answer.identity):
            try:
                pidfd = identity.watch(answer.identity)
            except OSError:
                pidfd = None  # its silence will tell
            else:
                if pidfd is None:
                    raise TransferError("the receiver has ended")
        size = answer.geometry.slot_bytes
        memory = Memory(answer.base, answer.slots * size, size, answer.device, answer.device_id)
        try:
            remote = agent.connect(answer.remote_meta_bytes, memory)
        except TransferError:
            _close(pidfd)
            raise
        self.session = Session(answer.session, remote, pidfd)
        self.heard = time.monotonic()

    def cut(self, agent: Agent) -> None:
        """End the session, if there is one: nothing is written any more. Flights fail with the next look at them."""
        session, self.session = self.session, None
        if session is not None:
            agent.drop(session.remote)
            _close(session.pidfd)
            self.say(wire.Bye(session.token))


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
