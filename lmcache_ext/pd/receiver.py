"""The decode side of a hand-over: gives out slots, proves what was written to them, and makes it visible.

One thread owns the agent, the sockets and all sessions, and calls the Store. It waits for messages, never for a peer.
Bytes are proved here by the sum that the sender took before they left: what differs is never seen.

A sender that goes silent loses its requests at once, but not its slots: its bytes may still come. They return when it
says that nothing is in flight; when it is proved to have ended (a pidfd, on the same machine), plus the time in which
this process empties the sockets that it left; or, for a sender elsewhere, when the agent that it knows is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import Counter

import zmq

from lmcache_ext.pd import identity, wire
from lmcache_ext.pd.agent import Agent, Memory
from lmcache_ext.pd.intake import Intake, Session, Waiting, indexes, placed, tokens_of
from lmcache_ext.pd.options import ReceiverOptions, Sums
from lmcache_ext.pd.parts import Misfit, Plan
from lmcache_ext.pd.ports import Waker, bind, receive
from lmcache_ext.pd.store import Store

logger = logging.getLogger("lmcache_ext.pd")

TICK_MS = 100


class Receiver:
    """Listens on two ports from construction to `close`.

    Args:
        memory: this rank's slots.
        take_sums: of slots; `sums.of_pool` for a host pool, `GpuSums` for a GPU's memory.
        geometry: of the slots; senders that do not fit are refused.
        store: shared with the receivers of the engine's other ranks.
        options: ports, bounds, deadlines.

    Raises:
        ConfigError: NIXL is missing or does not start.
        zmq.ZMQError: a port is taken.
    """

    def __init__(
        self, memory: Memory, take_sums: Sums, geometry: wire.Geometry, store: Store, options: ReceiverOptions
    ) -> None:
        self._memory = memory
        self._sums = take_sums
        self._geometry = geometry
        self._store = store
        self._options = options
        self._identity = identity.own()
        self._agent = Agent(memory, receives=True, backends=options.backends)
        self._meta = self._agent.metadata()
        self._context = zmq.Context()
        try:
            self._init, self.init_port = bind(self._context, options.host, options.init_port)
            self._alloc, self.alloc_port = bind(self._context, options.host, options.alloc_port)
        except zmq.ZMQError:
            self._context.destroy(0)
            self._agent.close()
            raise
        self._sessions: dict[bytes, Session] = {}
        self._waiting: list[Waiting] = []
        self._ticks = 0
        self._last_tick = self._next_beat = time.monotonic()
        self.counts: Counter[str] = Counter()
        """What happened, by kind. Read from any thread."""
        self._stop = threading.Event()
        self._waker = Waker()
        self._poller = zmq.Poller()
        for readable in (self._init, self._alloc, self._waker.fd):
            self._poller.register(readable, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="lmcache-pd-receiver", daemon=True)
        self._thread.start()

    # -- from any thread --------------------------------------------------------------------------------------------

    @property
    def open(self) -> int:
        """Requests that have places which are not all filled, those in quarantine included."""
        return sum(len(session.intakes) for session in list(self._sessions.values()))

    def close(self, timeout: float) -> bool:
        """End. What is not complete is abandoned, its slots stay taken. False if the thread did not end in time."""
        self._stop.set()
        self._waker.wake()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._memory.enter()
        try:
            while not self._stop.is_set():
                self._turn()
        finally:
            for session in self._sessions.values():
                session.abandon(self._store)
                self._unwatch(session)
            self._agent.close()
            self._context.destroy(0)
            self._waker.close()

    def _turn(self) -> None:
        try:
            readable = dict(self._poller.poll(TICK_MS))
            if self._init in readable:
                for frames in receive(self._init):
                    self.on_init(frames)
            if self._alloc in readable:
                for frames in receive(self._alloc):
                    self.on_alloc(frames)
            for session in [s for s in self._sessions.values() if s.pidfd is not None and s.pidfd in readable]:
                self._gone(session, "ended")
            self._waker.clear()
            if time.monotonic() >= self._last_tick + TICK_MS / 1000:
                self._tick()
        except Exception:
            # One message must not end the service for all; what it was about runs into its deadline.
            self.counts["fault"] += 1
            logger.exception("receiver")

    def on_init(self, frames: list[bytes]) -> None:
        """One message on the init port. For the thread, and for tests."""
        envelope = frames[:2]
        ask = wire.decode_init(frames[2:])
        if ask is None:
            self.counts["malformed"] += 1
        answer = (
            wire.Refusal("version", f"not a request of version {wire.VERSION}") if ask is None else self._admit(ask)
        )
        if isinstance(answer, wire.Refusal):
            self.counts["refused"] += 1
        with contextlib.suppress(zmq.ZMQError):  # whoever asked has gone
            self._init.send_multipart([*envelope, *wire.sealed(answer)], zmq.NOBLOCK)

    def _admit(self, ask: wire.NixlInitRequest) -> wire.NixlInitResponse | wire.Refusal:
        if ask.version != wire.VERSION:
            return wire.Refusal("version", f"version {ask.version}, this is {wire.VERSION}")
        try:
            plan = Plan(ask.geometry, self._geometry)
        except Misfit as error:
            return wire.Refusal("geometry", str(error))
        if len(self._sessions) >= self._options.sessions:
            return wire.Refusal("busy", f"{len(self._sessions)} sessions")
        token = secrets.token_bytes(wire.SESSION_BYTES)
        session = Session(token, plan, ask.identity, identity.same_machine(ask.identity))
        session.heard = time.monotonic()
        if session.here:
            try:
                session.pidfd = identity.watch(ask.identity)
            except (OSError, OverflowError):  # then only its word frees what it leaves behind
                logger.warning("sender %d can't be watched", ask.identity.pid)
            else:
                if session.pidfd is None:
                    return wire.Refusal("session", "you have ended")
                self._poller.register(session.pidfd, zmq.POLLIN)
        self._sessions[session.token] = session
        memory = self._memory
        return wire.NixlInitResponse(
            wire.VERSION, session.token, self._geometry, self._meta, self._identity, memory.address, memory.slots,
            memory.device, memory.device_id,
        )  # fmt: skip

    def on_alloc(self, frames: list[bytes]) -> None:
        """One message on the alloc port. For the thread, and for tests."""
        message = wire.decode_from_sender(frames[1:])
        if message is None:
            self.counts["malformed"] += 1
            return
        session = self._sessions.get(message.session)
        if session is None or (session.closed and not isinstance(message, (wire.CancelNotif, wire.Bye))):
            self.counts["refused"] += 1
            if not isinstance(message, (wire.CancelNotif, wire.Bye)):
                self._say(frames[0], wire.Refusal("session", "no such session", message.session))
            return
        session.route, session.heard, session.silent_since = frames[0], time.monotonic(), None
        if isinstance(message, wire.AllocRequest):
            self._ask(session, message)
        elif isinstance(message, wire.ChunksWritten):
            self._written(session, message)
        elif isinstance(message, wire.CancelNotif):
            self._cancelled(session, message)
        elif isinstance(message, wire.Bye):
            self._gone(session, "bye")

    def _say(self, route: bytes | None, message: wire.FromReceiver) -> bool:
        """Send, or give up at once. False: that connection is gone."""
        try:
            if route is not None:
                self._alloc.send_multipart([route, *wire.sealed(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            return error.errno != zmq.EHOSTUNREACH
        return True

    # -- requests ---------------------------------------------------------------------------------------------------

    def _ask(self, session: Session, ask: wire.AllocRequest) -> None:
        tokens = tokens_of(ask, self._geometry, self._memory.slots)
        good = ask.number > session.highest and len(ask.req_id) <= wire.MAX_ID and ask.wait_s >= 0
        if tokens is None or not good:
            self._refuse(session, ask.number, "malformed, or known already")
            return
        session.highest = ask.number
        until = time.monotonic() + min(ask.wait_s, self._options.alloc_wait_s)
        waiting = Waiting(session, ask, tokens, until)
        # In turn where keys are the same, or a request could wait for one that came later, for as long as those come.
        free = all(set(ask.keys).isdisjoint(other.ask.keys) for other in self._waiting)
        if free and self._place(waiting):
            return
        if len(self._waiting) < self._options.waiting:
            self._waiting.append(waiting)
        else:
            self._full(waiting)

    def _place(self, waiting: Waiting) -> bool:
        session = waiting.session
        intake = placed(waiting, self._store, self._options.stall_s)
        if intake is None:
            return False
        if intake.left:
            session.intakes[intake.number] = intake
        self.counts["placed"] += 1
        self.counts["there already"] += len(intake.places) - len(intake.left)
        self._say(session.route, wire.AllocResponse(session.token, intake.number, *indexes(intake.places)))
        return True

    def _full(self, waiting: Waiting) -> None:
        self.counts["full"] += 1
        session, ask = waiting.session, waiting.ask
        self._say(session.route, wire.AllocResponse(session.token, ask.number, [-1] * len(ask.keys), []))

    def _refuse(self, session: Session, number: int, why: str) -> None:
        self.counts["refused"] += 1
        self._say(session.route, wire.Refusal("request", why, session.token, number))

    def _written(self, session: Session, message: wire.ChunksWritten) -> None:
        intake = session.intakes.get(message.number)
        if intake is None:
            self._refuse(session, message.number, "no such request")
            return
        if len(message.indexes) != len(message.sums):
            self.counts["malformed"] += 1
            return
        said = {i: total for i, total in zip(message.indexes, message.sums, strict=True) if i in intake.left}
        wanted = [i for i in said if not intake.abandoned and intake.left[i].good]
        asked = [(intake.places[i].slot, session.plan.runs(intake.tokens[i], at_receiver=True)) for i in wanted]
        good = []
        for i, total in zip(wanted, self._sums(asked), strict=True):
            if self._proved(intake, i, total == said[i]):
                good.append(i)
        bad = [i for i in said if i not in good]
        intake.due = time.monotonic() + self._options.stall_s
        if not intake.left:
            del session.intakes[intake.number]
            self.counts["complete"] += 1
        self._say(session.route, wire.ChunksTaken(session.token, intake.number, good, bad))

    def _proved(self, intake: Intake, index: int, right: bool) -> bool:
        """Make a chunk visible, if it is what was sent. Returns whether it is."""
        ticket = intake.left[index]
        if not right:
            self.counts["wrong sum"] += 1
            logger.warning("chunk %d of %s is not what was sent", index, intake.req_id)
            self._store.abandon(ticket)  # it stays in `left`: more bytes may come
            return False
        del intake.left[index]
        self._store.commit(ticket)
        self.counts["chunks"] += 1
        return True

    def _cancelled(self, session: Session, message: wire.CancelNotif) -> None:
        self._waiting = [
            each for each in self._waiting if each.session is not session or each.ask.number != message.number
        ]
        self._store.claim(message.req_id)
        intake = session.intakes.get(message.number)
        if intake is None:
            return
        self.counts["cancelled"] += not intake.abandoned
        intake.abandon(self._store)
        if message.quiet:
            intake.give_back(self._store)
            del session.intakes[message.number]

    # -- time -------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._last_tick > self._options.silence_s / 2:  # we were stopped; nobody else was silent
            for session in self._sessions.values():
                session.heard = max(session.heard, now)
        self._last_tick = now
        self._ticks += 1
        self._store.expire()
        self._admit_waiting(now)
        for session in list(self._sessions.values()):
            for intake in session.stalled(now):
                self._give_up(session, intake, "stalled")
            if self._look_after(session, now):
                del self._sessions[session.token]
        if any(self._shuts_out(session, now) for session in self._sessions.values()):
            self._renew()
        if now >= self._next_beat:
            self._next_beat = now + self._options.beat_s
            for session in self._sessions.values():
                if not self._say(session.route, wire.Ping(session.token)) and not session.gone:
                    self._silent(session, now, "its connection is lost")
                for intake in session.intakes.values():
                    if intake.abandoned:  # said again: its word that nothing is in flight may have been lost
                        self._say(session.route, wire.Refusal("request", "given up", session.token, intake.number))

    def _admit_waiting(self, now: float) -> None:
        still: list[Waiting] = []
        wanted: set[bytes] = set()  # by those that wait for longer
        for waiting in self._waiting:
            if waiting.session.gone or waiting.session.silent_since is not None or waiting.session.closed:
                continue
            if wanted.isdisjoint(waiting.ask.keys) and self._place(waiting):
                continue
            wanted.update(waiting.ask.keys)
            if waiting.until <= now:
                self._full(waiting)
            else:
                still.append(waiting)
        self._waiting = still

    def _look_after(self, session: Session, now: float) -> bool:
        """True if nothing is left to be looked after."""
        if session.drain is not None:
            if self._ticks < session.drain:
                return False
            session.give_back(self._store)
            return True
        if (session.closed or session.silent_since is not None) and not session.intakes:
            self._unwatch(session)
            return True
        if session.silent_since is None and now - session.heard > self._options.silence_s:
            self._silent(session, now, f"silent for {self._options.silence_s:g} s")
        return False

    def _shuts_out(self, session: Session, now: float) -> bool:
        since = session.silent_since
        return not session.here and not session.gone and since is not None and now - since > self._options.quarantine_s

    def _silent(self, session: Session, now: float, why: str) -> None:
        if session.silent_since is None:
            session.silent_since = now
            self.counts["silent"] += 1
            for intake in list(session.intakes.values()):
                self._give_up(session, intake, why)

    def _give_up(self, session: Session, intake: Intake, why: str) -> None:
        if not intake.abandoned:
            self.counts["given up"] += 1
            logger.warning("%s of sender %d is given up: %s", intake.req_id, session.peer.pid, why)
            intake.abandon(self._store)
            self._say(session.route, wire.Refusal("request", why, session.token, intake.number))

    def _gone(self, session: Session, why: str) -> None:
        """It writes nothing any more; what its sockets hold arrives within a few ticks."""
        self._unwatch(session)
        if session.drain is None:
            # Counted in turns of this loop, which do not pass while the process is stopped.
            session.drain = self._ticks + round(self._options.drain_s * 1000 / TICK_MS)
            self.counts[why] += 1
            session.abandon(self._store)

    def _unwatch(self, session: Session) -> None:
        if session.pidfd is not None:
            self._poller.unregister(session.pidfd)
            os.close(session.pidfd)
            session.pidfd = None

    def _renew(self) -> None:
        """Shut out all senders elsewhere, by an agent that they do not know. Costs every sender a new session."""
        self.counts["renewed"] += 1
        logger.warning("a silent sender on another machine holds slots: the NIXL agent is replaced")
        self._agent.close()
        self._agent = Agent(self._memory, receives=True, backends=self._options.backends)
        self._meta = self._agent.metadata()
        for session in list(self._sessions.values()):
            session.closed = True
            session.abandon(self._store)
            if not session.here:
                session.give_back(self._store)
                del self._sessions[session.token]
