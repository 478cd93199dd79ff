"""All receivers of one sender: sessions, questions, answers and transfers. Owned by the sender's thread."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Sequence

import numpy as np
import zmq

from lmcache_ext.errors import TransferError
from lmcache_ext.pd import wire
from lmcache_ext.pd.agent import Agent, State, Transfer
from lmcache_ext.pd.handover import Handover, Outcome, Target
from lmcache_ext.pd.link import Flight, Link, Session
from lmcache_ext.pd.notify import Notifier
from lmcache_ext.pd.options import SenderOptions
from lmcache_ext.pd.parts import Misfit, Plan, at
from lmcache_ext.pd.ports import connect, receive
from lmcache_ext.tiers.breaker import Breaker

_LOOK_S = 0.1
_LONGEST_RETRY_S = 60.0


class Links:
    """Moves hand-overs on, and tells by `on_taken`, `on_landed` and `on_end` what came of it."""

    on_taken: Callable[[Handover, Sequence[int]], None]
    on_landed: Callable[[Handover, Sequence[int]], None]
    on_end: Callable[[Handover, Outcome, str], None]
    counts: Counter[str]

    def __init__(
        self,
        agent: Agent,
        context: zmq.Context[zmq.Socket[bytes]],
        geometry: wire.Geometry,
        options: SenderOptions,
    ) -> None:
        self._agent = agent
        self._context = context
        self._geometry = geometry
        self._options = options
        self._links: dict[Target, Link] = {}
        self._notifier = Notifier(context, options.proxy, geometry.rank) if options.proxy else None
        self._looked = time.monotonic()
        self.poller = zmq.Poller()
        self.more = False  # whether `move` left something that could be posted at once

    @property
    def flying(self) -> bool:
        """Whether anything is in flight."""
        return any(link.flights for link in self._links.values())

    def tell(self, handover: Handover) -> None:
        """Word to the proxy, unless nobody waits for it."""
        together, stored = handover.together, handover.outcome is Outcome.STORED
        if handover.outcome is not Outcome.CANCELLED and (together is None or together.ended(stored)):
            self.notify(handover.req_id, stored, together.ranks if together else ())

    def notify(self, req_id: str, stored: bool, ranks: Sequence[int] = ()) -> None:
        """Word to the proxy of `ranks`, or of our own."""
        if self._notifier is not None:
            sent = self._notifier.tell(req_id, stored, ranks)
            self.counts["notified" if sent else "notification dropped"] += 1

    # -- hand-overs -------------------------------------------------------------------------------------------------

    def plan(self, target: Target) -> Plan:
        """What goes to a target that `begin` knows."""
        return self._links[target].plan

    def begin(self, handover: Handover) -> None:
        """Ask for slots, as soon as there is a session. Ends it at once if the receiver is known to be dead.

        Raises:
            Misfit: there is nothing for that rank here.
        """
        link = self._links.get(handover.target) or self._new(handover.target)
        now = link.used = time.monotonic()
        if not link.breaker.closed and not link.probing:
            link.probing = link.breaker.claim_probe(now)
            if not link.probing:
                self.on_end(handover, Outcome.DEAD, "it was dead a moment ago")
                return
        elif link.probing:
            self.on_end(handover, Outcome.DEAD, "another request tries whether it lives")
            return
        link.handovers[handover.number] = handover
        if link.session is not None:
            self._ask(link, handover)
        elif link.init is None:
            self._open(link)

    def end(self, handover: Handover) -> None:
        """Nothing more of it shall be written; some may be in flight."""
        if handover.outcome is not Outcome.STORED and not handover.still:
            self._cancel(handover, quiet=False)

    def forget(self, handover: Handover) -> None:
        """Nothing of it is in flight."""
        if handover.outcome is not Outcome.STORED:
            self._cancel(handover, quiet=True)
        link = self._links.get(handover.target)
        if link is not None:
            link.handovers.pop(handover.number, None)

    def _cancel(self, handover: Handover, quiet: bool) -> None:
        link = self._links.get(handover.target)
        if link is not None and link.session is not None and handover.asked and handover.number in link.handovers:
            link.say(wire.CancelNotif(link.session.token, handover.number, handover.req_id, quiet))

    def _ask(self, link: Link, handover: Handover) -> None:
        assert link.session is not None
        wait_s = self._options.alloc_wait_s
        handover.asked = True
        handover.answer_due = time.monotonic() + wait_s + self._options.answer_s
        link.say(
            wire.AllocRequest(
                link.session.token, handover.number, handover.req_id, handover.keys, handover.last_tokens, wait_s
            )
        )

    # -- links ------------------------------------------------------------------------------------------------------

    def _new(self, target: Target) -> Link:
        idle = [each for each in self._links.values() if not each.handovers and not each.flights]
        if len(self._links) >= self._options.links and idle:
            self._drop(min(idle, key=lambda each: each.used))
        breaker = Breaker(f"receiver {target.host}:{target.alloc_port}", 1, self._options.retry_s, _LONGEST_RETRY_S)
        plan = Plan(self._geometry, at(self._geometry, target.rank, target.ranks))
        link = Link(target, plan, breaker, connect(self._context, zmq.DEALER, target.host, target.alloc_port))
        self.poller.register(link.alloc, zmq.POLLIN)
        self._links[target] = link
        return link

    def _drop(self, link: Link) -> None:
        self._cut(link)
        self._no_init(link)
        self.poller.unregister(link.alloc)
        link.alloc.close(1000)  # ms in which a last word may leave
        del self._links[link.target]

    def _open(self, link: Link) -> None:
        link.ask(self._context, self._geometry, self._options)
        self.poller.register(link.init, zmq.POLLIN)

    def _no_init(self, link: Link) -> None:
        if link.init is not None:
            self.poller.unregister(link.init)
            link.init.close(0)
            link.init = None

    def _cut(self, link: Link) -> None:
        if link.session is not None and link.session.pidfd is not None:
            self.poller.unregister(link.session.pidfd)
        link.cut(self._agent)

    def _fault(self, link: Link, why: str) -> None:
        """The receiver is dead, as far as we can tell."""
        self._no_init(link)
        self._cut(link)
        self.counts["receiver lost"] += 1
        if link.probing:
            link.probing = False
            link.breaker.probed(False, time.monotonic())
        else:
            link.breaker.fault(time.monotonic(), why, at_once=True)
        self._fly(link, time.monotonic())
        for handover in list(link.handovers.values()):
            self.on_end(handover, Outcome.DEAD, why)

    def _again(self, link: Link) -> None:
        """The receiver does not know our session: ask for another, once, for what had no slots in the old one."""
        self._cut(link)
        self._fly(link, time.monotonic())
        for handover in list(link.handovers.values()):
            if handover.places is not None or handover.retried:
                self.on_end(handover, Outcome.DEAD, "the receiver has forgotten us")
            else:
                handover.retried, handover.asked = True, False
        if link.handovers and link.init is None:
            self._open(link)

    # -- messages ---------------------------------------------------------------------------------------------------

    def hear(self, readable: Container[object]) -> None:
        """Handle what has come on sockets."""
        for link in list(self._links.values()):
            if link.init is not None and link.init in readable:
                for frames in receive(link.init):
                    self.on_answer(link, frames)
                    break
            if link.alloc in readable:
                for frames in receive(link.alloc):
                    self.on_message(link, frames)

    def on_answer(self, link: Link, frames: list[bytes]) -> None:
        """One message of an init port."""
        answer = wire.decode_answer(frames[1:])
        if answer is None:
            self.counts["malformed"] += 1
            return
        self._no_init(link)
        if isinstance(answer, wire.Refusal):
            self._refused(link, f"{answer.reason}: {answer.text}")
            return
        try:
            link.open(self._agent, answer)
        except TransferError as error:
            self._fault(link, str(error))
            return
        except Misfit as error:
            self._refused(link, str(error))
            return
        assert link.session is not None
        if link.session.pidfd is not None:
            self.poller.register(link.session.pidfd, zmq.POLLIN)
        if link.probing:
            link.probing = False
            link.breaker.probed(True, link.heard)
        for handover in list(link.handovers.values()):
            if handover.outcome is None:
                self._ask(link, handover)

    def _refused(self, link: Link, why: str) -> None:
        if link.probing:
            link.probing = False
            link.breaker.probed(False, time.monotonic())
        for handover in list(link.handovers.values()):
            self.on_end(handover, Outcome.REFUSED, why)

    def on_message(self, link: Link, frames: list[bytes]) -> None:
        """One message of an alloc port."""
        message = wire.decode_from_receiver(frames)
        session = link.session
        if message is None:
            self.counts["malformed"] += 1
        elif session is None or message.session != session.token:
            if isinstance(message, wire.Ping):  # it may still keep slots for a session that we have cut
                link.say(wire.Bye(message.session))
        else:
            link.heard = time.monotonic()
            self._message(link, session, message)

    def _message(self, link: Link, session: Session, message: wire.FromReceiver) -> None:
        if isinstance(message, wire.Ping):
            link.say(wire.Pong(session.token))
            return
        if isinstance(message, wire.Refusal) and message.reason == "session":
            self._again(link)
            return
        handover = link.handovers.get(message.number)
        if handover is None and isinstance(message, wire.Refusal):  # nothing of it is in flight; that was said once
            link.say(wire.CancelNotif(session.token, message.number, "", quiet=True))
        if handover is None or handover.outcome is not None or not handover.asked:
            return
        if isinstance(message, wire.AllocResponse):
            self._allocated(link, handover, message)
        elif isinstance(message, wire.ChunksTaken):
            self._answered(handover, message)
        else:
            self.on_end(handover, Outcome.REFUSED, message.text)

    def _allocated(self, link: Link, handover: Handover, message: wire.AllocResponse) -> None:
        assert link.session is not None
        places, there = message.remote_indexes, set(message.already_sent_indexes)
        count, slots = len(handover.keys), link.session.remote.memory.slots
        if handover.places is not None or len(places) != count or not there <= set(range(count)):
            self.counts["malformed"] += 1
        elif places == [-1] * count:
            self.on_end(handover, Outcome.FULL, "the receiver has no slots")
        elif not all(0 <= place < slots for place in places) or len(set(places)) < count:
            self.counts["malformed"] += 1
        else:
            handover.places, handover.skipped = places, len(there)
            link.breaker.success()
            self.on_taken(handover, sorted(there))

    def _answered(self, handover: Handover, message: wire.ChunksTaken) -> None:
        good = [index for index in message.good if index in handover.unanswered]
        bad = [index for index in message.bad if index in handover.unanswered]
        handover.unanswered.difference_update(good, bad)
        handover.answer_due = time.monotonic() + self._options.answer_s
        self.on_taken(handover, good)
        if bad:
            self.on_end(handover, Outcome.CORRUPT, f"chunks {bad} did not arrive as they were")

    # -- transfers --------------------------------------------------------------------------------------------------

    def move(self) -> None:
        """Look at what is in flight, and post one transfer for each receiver that may have one."""
        self.more = False
        now = time.monotonic()
        for link in list(self._links.values()):
            self._fly(link, now)
            if link.session is not None and link.flying_bytes < self._options.inflight_bytes:
                self._post(link)

    def _post(self, link: Link) -> None:
        for number, handover in list(link.handovers.items()):
            if handover.outcome is None and handover.places is not None and handover.queued:
                indexes = handover.next_batch(self._geometry, self._options.post_bytes if link.plan.whole else 1)
                if indexes:
                    self._launch(link, handover, indexes)
                link.handovers.pop(number)
                link.handovers[number] = handover  # the others' turn
                self.more = True
                return

    def _launch(self, link: Link, handover: Handover, indexes: list[int]) -> None:
        try:
            transfer = self._write(link, handover, indexes)
        except TransferError as error:
            self._fault(link, str(error))
            return
        handover.flying.update(indexes)
        link.flights.append(Flight(transfer, handover, indexes, time.monotonic() + self._options.transfer_s))
        self._fly(link, time.monotonic())

    def _write(self, link: Link, handover: Handover, indexes: list[int]) -> Transfer:
        assert link.session is not None and handover.places is not None
        mine = [handover.slots[index] for index in indexes]
        theirs = [handover.places[index] for index in indexes]
        tokens = handover.tokens(indexes[-1], self._geometry)
        if not link.plan.whole:
            return self._agent.write_pieces(link.session.remote, mine[0], theirs[0], link.plan.pieces(tokens))
        nbytes = self._geometry.nbytes(tokens)
        if nbytes == self._geometry.slot_bytes:
            return self._agent.write(link.session.remote, mine, theirs)
        part = np.array([[0, 0, nbytes]], np.int64)
        return self._agent.write_pieces(link.session.remote, mine[0], theirs[0], part)

    def _fly(self, link: Link, now: float) -> None:
        """Look at a receiver's transfers."""
        for flight in list(link.flights):
            if flight not in link.flights:  # a fault of the one before has ended it
                continue
            state = flight.transfer.state()
            if state is State.PROC:
                if now > flight.deadline and link.session is not None:
                    self._fault(link, f"a transfer took more than {self._options.transfer_s:g} s")
                    return
                continue
            link.flights.remove(flight)
            self._flown(link, flight, state)

    def _flown(self, link: Link, flight: Flight, state: State) -> None:
        handover, indexes = flight.handover, flight.indexes
        handover.flying.difference_update(indexes)
        if state is State.DONE and handover.outcome is None and link.session is not None:
            if not handover.unanswered:
                handover.answer_due = time.monotonic() + self._options.answer_s
            handover.unanswered.update(indexes)
            sums = [handover.sums.pop(index) for index in indexes]
            link.say(wire.ChunksWritten(link.session.token, handover.number, indexes, sums))
        elif state is State.ERR and link.session is not None:
            self._fault(link, "a transfer failed")
        self.on_landed(handover, indexes)

    # -- time -------------------------------------------------------------------------------------------------------

    def look(self, now: float) -> bool:
        """See to deadlines, if it is time to."""
        away = now - self._looked
        if away < _LOOK_S:
            return False
        self._looked = now
        ended = {fd for fd, _ in self.poller.poll(0)}
        for link in list(self._links.values()):
            if away > self._options.silence_s / 2:  # we were stopped; nobody else was silent
                link.heard = now
            self._look_at(link, ended, now)
        return True

    def _look_at(self, link: Link, ended: set[object], now: float) -> None:
        options = self._options
        if link.init is not None and now > link.init_due:
            self._fault(link, f"no answer within {options.connect_s:g} s")
        elif link.session is not None and link.session.pidfd in ended:
            self._fault(link, "the receiver has ended")
        elif link.session is not None and now - link.heard > options.silence_s:
            self._fault(link, f"silent for {options.silence_s:g} s")
        else:
            for handover in list(link.handovers.values()):
                waits = handover.unanswered or (handover.asked and handover.places is None)
                if handover.outcome is None and waits and now > handover.answer_due:
                    self.on_end(handover, Outcome.TIMEOUT, "no answer in time")

    def close(self) -> None:
        """Cut everything."""
        for link in list(self._links.values()):
            self._drop(link)
        if self._notifier is not None:
            self._notifier.close(1.0)
        self._agent.close()
