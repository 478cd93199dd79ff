"""A client of the shared cache server: what is ready, leases, reservations. No method waits, unless it says so.

Everything that goes wrong is a miss, or a store that does not happen: a server that is not there, that stands still,
that was started anew, that refuses. The client finds back by itself.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmcache_ext.server import protocol as p
from lmcache_ext.server.link import Attachment, Call, Link, Spec, State
from lmcache_ext.server.owners import this_process

__all__ = ["Client", "Grant", "Hit", "Spec"]

_ASK_AGAIN = 0.003  # seconds, while tiers are at work
_MOST_ASKS = 64  # in one request


@dataclass(eq=False)
class Grant:
    """Slots that the server granted: a lease to read, or a reservation to write. End it exactly once, by `release` or
    `complete`; then, and while the bytes are in use, nobody else writes them.
    """

    attachment: Attachment
    ticket: int
    offsets: list[int]  # in the segment; of a reservation also EXISTS, FULL or QUOTA
    spec: Spec
    ended: bool = False
    at: int = 0  # of a lease: so many chunks had left the server

    @property
    def slots(self) -> list[int]:
        """Indices of the keys that have a slot."""
        return [i for i, offset in enumerate(self.offsets) if offset >= 0]

    def parts(self, i: int) -> list[memoryview]:
        """The memory of key `i`'s slot, writable, one part for each rank."""
        starts = self.attachment.groups[self.spec.root].starts
        at = self.offsets[i]
        return [self.attachment.view(at + start, n) for start, n in zip(starts, self.spec.parts, strict=True)]


@dataclass(frozen=True)
class Hit:
    """What came of a look-up: so many leading chunks are ready, and leased if that was wanted."""

    ready: int
    lease: Grant | None = None


@dataclass(eq=False)
class _Look:
    """One look-up. Guarded by the client's lock."""

    ask: p.Ask
    spec: Spec
    give_up: float
    again: float = 0.0  # when to ask
    asking: bool = False
    sent: Attachment | None = None
    hit: Hit | None = None


@dataclass(eq=False)
class Reserving:
    """A reservation that is being asked for."""

    deadline: float
    grant: Grant | None = None  # guarded by _lock
    _done: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def over(self) -> bool:
        """Whether there is nothing to wait for any more: `grant` is what there is."""
        if not self._done.is_set() and time.monotonic() >= self.deadline:
            self.settle(None)
        return self._done.is_set()

    def wait(self) -> Grant | None:
        """The grant, or None by the deadline at the latest."""
        self._done.wait(timeout=max(0.0, self.deadline - time.monotonic()))
        self.settle(None)
        return self.grant

    def settle(self, grant: Grant | None) -> bool:
        """This is what came of it. False: it was settled before."""
        with self._lock:
            if self._done.is_set():
                return False
            self.grant = grant
            self._done.set()
            return True


class Client:
    """Thread-safe.

    Args:
        address: tcp://host:port of the server.
        name: for people; default: the process's number.
        processes: of all that will read or write slots for this client; default: this one.
        patience: seconds until a request counts as unanswered.
    """

    def __init__(
        self, address: str, name: str = "", processes: Sequence[p.Process] = (), patience: float = 0.25
    ) -> None:
        self._link = Link(address, name or f"process {os.getpid()}", processes or [this_process()], patience)
        self._link.timer = self._ask
        self._lock = threading.Lock()
        self._looks: dict[str, _Look] = {}  # guarded by _lock
        self._tickets = itertools.count(1)
        self._patience = patience
        self._link.start()

    @property
    def up(self) -> bool:
        """Whether the server answers."""
        return self._link.state is State.UP

    @property
    def attachment(self) -> Attachment | None:
        """The session of now; changes with every start of the server."""
        return self._link.attachment

    def wait_up(self, timeout: float, root: bytes | None = None) -> bool:
        """Wait until the server answers and the group of `root` is joined, at most `timeout` seconds."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            at = self._link.attachment
            if self.up and at and (root is None or root in at.groups):
                return True
            time.sleep(0.002)
        return False

    def spec(self, root: bytes) -> Spec:
        """What was joined under this root. Raises KeyError."""
        return self._link.specs[root]

    def join(self, spec: Spec) -> None:
        """Be in this group, with every server to come."""
        self._link.join(spec)

    def leave(self, root: bytes) -> None:
        """Be in this group no longer. What is leased or reserved of it stays so."""
        self._link.leave(root)

    def adopt(self, processes: Sequence[p.Process]) -> None:
        """These processes also read and write slots for this client."""
        self._link.adopt(processes)

    def close(self, timeout: float = 1.0, bye: bool = True) -> None:
        """End, in at most `timeout` seconds.

        Args:
            bye: say goodbye: neither this client's processes nor their copies touch a slot any more. Otherwise what is
                held comes back once these processes have ended.
        """
        self._link.close(timeout, bye)

    # -- reading ----------------------------------------------------------------------------------------------------

    def lookup(
        self, id: str, root: bytes, keys: Sequence[bytes], *, last: int = 0, salt: bytes = b"", wait: float = 0.0,
        lease: bool = True,
    ) -> Hit | None:  # fmt: skip
        """How many leading `keys` are ready? None: not known yet, ask again with the same `id`. Known after
        `wait` + patience seconds at the latest, and from then on the same until `forget(id)`. Of more than 4096 keys
        only the first are looked at.

        Args:
            last: tokens of the last chunk, 0: a full one.
            wait: seconds that tiers may take to bring what host memory lacks.
            lease: hold what is ready.
        """
        now = time.monotonic()
        with self._lock:
            look = self._looks.get(id)
            if look is None:
                spec = self._link.specs.get(root)
                if not keys or spec is None or not self.up:
                    return Hit(0)
                ticket = next(self._tickets) if lease else 0
                last = last if len(keys) <= p.MAX_KEYS else 0
                ask = p.Ask(id, b"".join(keys[: p.MAX_KEYS]), last, salt, min(wait, p.MAX_WAIT), ticket)
                look = self._looks[id] = _Look(ask, spec, now + wait + self._patience)
                self._link.poke()
            elif look.hit is None and now >= look.give_up:
                self._settle(look, Hit(0), cancel=True)
            return look.hit

    def forget(self, id: str) -> None:
        """The look-up is over, and what it leased is given back, unless that was done before."""
        with self._lock:
            look = self._looks.pop(id, None)
            if look is None:
                return
            if look.hit is None:
                self._settle(look, Hit(0), cancel=True)
            lease = look.hit.lease if look.hit else None
        if lease:
            self.release(lease)

    def keep(self, id: str) -> None:
        """The look-up is over; whoever has its lease gives that back by `release`."""
        with self._lock:
            self._looks.pop(id, None)

    def release(self, grant: Grant) -> None:
        """Give back a lease, or a reservation as failed. A second time does nothing."""
        if not grant.ended:
            grant.ended = True
            self._link.end(grant.attachment, p.Release(grant.attachment.session, [grant.ticket]))

    def lease(self, root: bytes, keys: Sequence[bytes]) -> Reserving:
        """Hold all of these, or none."""

        def make(at: Attachment, ticket: int) -> p.Request:
            return p.Lease(at.session, at.groups[root].group, ticket, b"".join(keys))

        return self._reserve(root, make)

    def _settle(self, look: _Look, hit: Hit, cancel: bool = False) -> None:
        look.hit = hit
        if cancel and look.sent:
            tickets = [look.ask.ticket] if look.ask.ticket else []
            self._link.end(look.sent, p.Release(look.sent.session, tickets, [look.ask.id]))

    def _ask(self) -> bool:
        """In the link's thread, in each round: send what is due, in as few requests as can be."""
        now, waiting = time.monotonic(), False
        due: dict[bytes, list[_Look]] = {}
        at = self._link.attachment if self.up else None
        with self._lock:
            for look in self._looks.values():
                if look.hit is not None or look.asking:
                    continue
                if at is None or look.spec.root not in at.groups or (look.sent and look.sent is not at):
                    self._settle(look, Hit(0), cancel=True)
                elif look.again <= now:
                    look.asking, look.sent = True, at
                    due.setdefault(look.spec.root, []).append(look)
                else:
                    waiting = True
        for looks in due.values():
            for some in _bunches(looks):
                self._send(some)
        return waiting

    def _send(self, looks: list[_Look]) -> None:
        root, asks = looks[0].spec.root, [look.ask for look in looks]

        def answered(at: Attachment | None, reply: p.Reply | None) -> None:
            self._answered(looks, at, reply)

        self._link.submit(
            Call(
                lambda at: p.Lookup(at.session, at.groups[root].group, asks),
                time.monotonic() + self._patience,
                answered,
            )
        )

    def _answered(self, looks: list[_Look], at: Attachment | None, reply: p.Reply | None) -> None:
        with self._lock:
            found = reply if isinstance(reply, p.Found) and len(reply.answers) == len(looks) else None
            for i, look in enumerate(looks):
                look.asking = False
                if look.hit is not None:  # given up: what came too late was cancelled then, after it was asked for
                    continue
                if found is None or at is None:
                    self._settle(look, Hit(0), cancel=True)
                elif found.answers[i].waits:
                    look.again = time.monotonic() + _ASK_AGAIN
                else:
                    self._settle(look, _hit(look, at, found.answers[i], found.at))

    # -- writing ----------------------------------------------------------------------------------------------------

    def prepare(self, root: bytes, keys: Sequence[bytes], *, last: int = 0, salt: bytes = b"") -> Reserving:
        """Ask for a slot for each of at most 4096 `keys`. Write the grant's slots, then `complete` it."""

        def make(at: Attachment, ticket: int) -> p.Request:
            return p.Prepare(at.session, at.groups[root].group, ticket, b"".join(keys), last, salt)

        return self._reserve(root, make)

    def complete(self, grant: Grant, success: bool = True, failed: Sequence[int] = ()) -> Call:
        """The slots are written, but those of the keys with these indices. The call's reply says how many chunks can be
        found now; None: none, the server is another one.
        """
        grant.ended = True
        session = grant.attachment.session
        if not grant.slots:  # then the server keeps no ticket
            call = Call(lambda at: None, reply=p.Done())
            call.done.set()
            return call
        return self._link.end(grant.attachment, p.Complete(session, grant.ticket, success, list(failed)))

    def _reserve(self, root: bytes, make: Callable[[Attachment, int], p.Request]) -> Reserving:
        ticket, spec = next(self._tickets), self._link.specs.get(root)
        pending = Reserving(time.monotonic() + self._patience)

        def answered(at: Attachment | None, reply: p.Reply | None) -> None:
            if at and spec and isinstance(reply, p.Prepared | p.Leased) and reply.offsets:
                grant = Grant(at, ticket, p.unpack_offsets(reply.offsets), spec)
                if not pending.settle(grant):
                    self.release(grant)
            elif at and reply is None:  # it may have been granted all the same
                self._link.end(at, p.Release(at.session, [ticket]))
            pending.settle(None)

        if self.up and spec is not None:
            self._link.submit(Call(lambda at: make(at, ticket), pending.deadline, answered))
        else:
            pending.settle(None)
        return pending

    # -- the rest ---------------------------------------------------------------------------------------------------

    def drop(self, root: bytes, keys: Sequence[bytes]) -> Call:
        """These must not be found again."""
        return self._tell(lambda at: p.Drop(at.session, at.groups[root].group, b"".join(keys)))

    def touch(self, root: bytes, keys: Sequence[bytes]) -> Call:
        """These were used; a chain's last chunk first."""
        return self._tell(lambda at: p.Touch(at.session, at.groups[root].group, b"".join(keys)))

    def clear(self, root: bytes | None = None) -> Call:
        """Forget a group's chunks, or everybody's."""
        return self._tell(lambda at: p.Clear(at.session, at.groups[root].group if root else 0))

    def quota(self, salt: str, limit: int | None = None) -> Call:
        """Bound a salt's bytes (-1: no more), or only ask. The reply is a `protocol.Share`."""
        return self._tell(lambda at: p.Quota(at.session, p.salt_digest(salt), limit))

    def departures(self, root: bytes, since: int) -> Call:
        """Which of a group's chunks have left: the reply is a `protocol.Departed`. `since`: the last one's `at`."""
        return self._tell(lambda at: p.Departures(at.session, at.groups[root].group, since))

    def stats(self) -> Call:
        """The reply is `protocol.Figures`."""
        return self._tell(lambda at: p.Stats(at.session))

    def _tell(self, make: Callable[[Attachment], p.Request]) -> Call:
        return self._link.submit(Call(make, time.monotonic() + self._patience))


def _hit(look: _Look, at: Attachment, answer: p.Answer, left: int) -> Hit:
    if not look.ask.ticket or not answer.offsets:
        return Hit(answer.ready if not look.ask.ticket else 0)
    return Hit(answer.ready, Grant(at, look.ask.ticket, p.unpack_offsets(answer.offsets), look.spec, at=left))


def _bunches(looks: list[_Look]) -> list[list[_Look]]:
    """As many in one request as it may hold."""
    bunches: list[list[_Look]] = []
    keys = 0
    for look in looks:
        n = len(look.ask.keys) // p.KEY_BYTES
        if not bunches or len(bunches[-1]) >= _MOST_ASKS or keys + n > p.MAX_KEYS:
            bunches.append([])
            keys = 0
        bunches[-1].append(look)
        keys += n
    return bunches
