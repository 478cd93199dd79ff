"""A client's connection: one thread that does all its I/O, and knows whether the server is there.

    LOST ──Welcome, Joined──▶ UP ──a deadline missed──▶ SILENT ──any reply──▶ UP
      ▲                        │                          │
      └──── another boot token, or a session that the server does not know

Requests are sent in UP only; otherwise they fail at once, and the thread knocks until the server answers. What gives
something back (`end`) is repeated until the server has acknowledged it, for as long as it is the same server.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import zmq

from lmcache_ext.server import protocol as p

logger = logging.getLogger("lmcache_ext.server.client")

_KNOCK = 0.2  # seconds between two tries while the server is not there
_REFUSED = 10.0  # seconds until a group that was refused is asked for again
_IDLE_MS, _SOON_MS = 50, 2


class State(enum.Enum):
    """What is known of the server."""

    LOST = "lost"
    UP = "up"
    SILENT = "silent"


@dataclass(frozen=True)
class Spec:
    """A group that a client wants to be in: see `protocol.Join`."""

    root: bytes
    model: str
    parts: tuple[int, ...]
    tokens: int


@dataclass(eq=False)
class Attachment:
    """One session with one server, and its segment. What was granted in one means nothing in another."""

    boot: bytes
    session: bytes
    memory: mmap.mmap
    welcome: p.Welcome
    groups: dict[bytes, p.Joined] = field(default_factory=dict)  # by root
    refused: dict[bytes, float] = field(default_factory=dict)  # when, by root, monotonic

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of the segment, writable."""
        return memoryview(self.memory)[offset : offset + nbytes]


Then: TypeAlias = Callable[["Attachment | None", "p.Reply | None"], None]


@dataclass(eq=False)
class Call:
    """One request and what became of it."""

    # The request; None, or a KeyError for a group that is not joined: it can't be asked of this server.
    make: Callable[[Attachment], p.Request | None]
    deadline: float = 0.0  # monotonic
    then: Then | None = None  # called once, in the link's thread, with the reply or None
    sent: Attachment | None = None  # where it went to; set by the link
    reply: p.Reply | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout: float) -> p.Reply | None:
        """The reply, or None if there is none by then."""
        return self.reply if self.done.wait(timeout=timeout) else None


@dataclass(eq=False)
class _End:
    """What must be told for certain."""

    attachment: Attachment
    request: p.Release | p.Complete
    call: Call
    numbers: list[int] = field(default_factory=list)  # that it was sent with
    when: float = 0.0  # when it was sent last


class Link:
    """Args:
    address: of the server, tcp://host:port.
    name: for people.
    processes: all processes that will touch slots.
    patience: seconds that one request may take.
    """

    def __init__(self, address: str, name: str, processes: Sequence[p.Process], patience: float) -> None:
        self.name, self.patience = name, patience
        self.state = State.LOST
        self.attachment: Attachment | None = None  # None in LOST
        self.specs: dict[bytes, Spec] = {}
        self.timer: Callable[[], bool] = lambda: False  # called in each round; True: call again soon
        self._address, self._processes = address, list(processes)
        self._calls: deque[Call] = deque()
        self._endings: deque[_End] = deque()
        self._open: dict[int, Call] = {}  # the thread's own, as all below
        self._ends: dict[int, _End] = {}  # by each number that they were sent with
        self._numbers = itertools.count(1)
        self._next_beat = 0.0
        self._boot = b""  # of the last reply
        self._ending, self._bye = threading.Event(), True
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="lmcache-client", daemon=True)

    # -- from any thread; nothing blocks but close -------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look for the server."""
        self._thread.start()

    def poke(self) -> None:
        """There is something to do."""
        os.eventfd_write(self._wake, 1)

    def submit(self, call: Call) -> Call:
        """Send it, or fail it where the server is not there."""
        self._calls.append(call)
        self.poke()
        return call

    def end(self, attachment: Attachment, request: p.Release | p.Complete) -> Call:
        """Have the server know this for certain, unless it is another one by then."""
        end = _End(attachment, request, Call(lambda at: None))
        self._endings.append(end)
        self.poke()
        return end.call

    def adopt(self, processes: Sequence[p.Process]) -> None:
        """More processes touch slots for this client, also with every server to come."""
        self._processes.extend(processes)
        self.submit(Call(lambda at: p.Adopt(at.session, list(processes)), time.monotonic() + self.patience))

    def join(self, spec: Spec) -> None:
        """Be in this group, also with every server to come."""
        self.specs[spec.root] = spec
        if at := self.attachment:
            self._calls.append(self._joining(at, spec))
            self.poke()

    def leave(self, root: bytes) -> None:
        """Be in this group no longer."""
        self.specs.pop(root, None)
        self._next_beat = 0.0
        self.poke()

    def close(self, timeout: float, bye: bool = True) -> None:
        """End the thread, within `timeout` seconds.

        Args:
            bye: end the session, too: nobody touches a slot any more. Else it ends with its processes.
        """
        self._bye = bye
        self._ending.set()
        self.poke()
        self._thread.join(timeout)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        context = zmq.Context()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.connect(self._address)
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        soon = False
        while not self._ending.is_set():
            poller.poll(_SOON_MS if soon or self._open else _IDLE_MS)
            try:
                soon = self._round()
            except Exception:
                logger.exception("%s: a fault in the cache client; its callers see misses", self.name)
        if self.attachment and self._bye:
            self._send(p.Bye(self.attachment.session), 0.0)
        self._socket.close(linger=200)
        context.term()

    def _round(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with contextlib.suppress(zmq.Again):
            while True:
                self._receive(self._socket.recv_multipart(zmq.NOBLOCK))
        now = time.monotonic()
        self._expire(now)
        soon = self.timer()
        if now >= self._next_beat:
            self._beat(now)
        for _ in range(len(self._calls)):
            self._start(self._calls.popleft(), now)
        self._tell(now)
        return soon

    def _start(self, call: Call, now: float) -> None:
        at = self.attachment if self.state is State.UP else None
        request = None
        with contextlib.suppress(KeyError):
            request = call.make(at) if at and call.deadline > now else None
        if at is None or request is None:
            self._finish(call, None)
            return
        call.sent = at
        self._open[self._send(request, call.deadline)] = call

    def _send(self, request: p.Request, deadline: float) -> int:
        number = next(self._numbers)
        with contextlib.suppress(zmq.Again):  # what is not sent misses its deadline
            self._socket.send_multipart(p.pack_request(number, request, deadline), zmq.NOBLOCK)
        return number

    def _finish(self, call: Call, reply: p.Reply | None) -> None:
        call.reply = reply
        if call.then:
            call.then(call.sent, reply)
        call.done.set()

    def _receive(self, frames: list[bytes]) -> None:
        try:
            number, boot, reply = p.unpack_reply(frames)
        except ValueError as error:
            logger.warning("%s: %s answers what we don't understand: %s", self.name, self._address, error)
            return
        at, self._boot = self.attachment, boot
        if at and boot != at.boot:
            self._lose("it is another server by now")
        elif at and isinstance(reply, p.Error) and reply.kind == "session":
            self._lose(reply.message)
        elif self.state is State.SILENT:
            self.state = State.UP
            logger.warning("%s: the cache server answers again", self.name)
        if (call := self._open.pop(number, None)) is not None:
            self._finish(call, reply)
        elif (end := self._ends.pop(number, None)) is not None:
            end.numbers.remove(number)
            if not isinstance(reply, p.Error) or reply.kind != "stale":
                self._ended(end, reply)
            elif not end.numbers:
                self._endings.append(end)

    def _expire(self, now: float) -> None:
        if not any(call.deadline <= now for call in self._open.values()):
            return
        if self.state is State.UP:
            self.state = State.SILENT
            logger.warning("%s: the cache server is silent; working without it", self.name)
        calls, self._open = self._open, {}
        for call in calls.values():
            self._finish(call, None)

    def _tell(self, now: float) -> None:
        """Send what gives something back, and again what was not acknowledged."""
        if self.state is State.SILENT:
            return
        again = dict.fromkeys(end for end in self._ends.values() if now - end.when > self.patience)
        ends = [self._endings.popleft() for _ in range(len(self._endings))]
        for end in [*again, *ends]:
            if end.attachment is self.attachment:
                end.when = now
                end.numbers.append(number := self._send(end.request, 0.0))
                self._ends[number] = end
            else:
                self._ended(end, None)

    def _ended(self, end: _End, reply: p.Reply | None) -> None:
        """The first answer counts, whichever time of sending it answers: the others say that it is done already."""
        for number in end.numbers:
            self._ends.pop(number, None)
        end.numbers.clear()
        self._finish(end.call, reply)

    # -- being there ------------------------------------------------------------------------------------------------

    def _beat(self, now: float) -> None:
        at = self.attachment
        self._next_beat = now + (at.welcome.silence / 5 if at and self.state is State.UP else _KNOCK)
        deadline = now + self.patience
        if at:
            call = Call(lambda at: None, deadline)
            request: p.Request = p.Ping(at.session)
            refused = {root for root, when in at.refused.items() if now - when < _REFUSED}
            missing = [spec for root, spec in list(self.specs.items()) if root not in at.groups.keys() | refused]
            self._calls.extend(self._joining(at, spec) for spec in missing)
            self._calls.extend(self._leaving(root, deadline) for root in at.groups.keys() - self.specs.keys())
        else:
            call = Call(lambda at: None, deadline, self._welcomed)
            request = p.Hello(self.name, self._processes)
        if self.state is State.UP or not self._open:
            self._open[self._send(request, deadline)] = call

    def _welcomed(self, _: Attachment | None, reply: p.Reply | None) -> None:
        if isinstance(reply, p.Error):
            logger.warning("%s: the cache server refuses us: %s", self.name, reply.message)
        if not isinstance(reply, p.Welcome) or self.attachment:
            return
        try:
            memory = _map(reply.path, reply.size)
        except OSError as error:
            logger.warning("%s: the cache server's memory can't be mapped: %s", self.name, error)
            return
        self.attachment = Attachment(self._boot, reply.session, memory, reply)
        self.state = State.UP
        self._next_beat = 0.0
        logger.info("%s: attached to the cache server at %s", self.name, self._address)

    def _joining(self, at: Attachment, spec: Spec) -> Call:
        def joined(_: Attachment | None, reply: p.Reply | None) -> None:
            if isinstance(reply, p.Joined):
                at.groups[spec.root] = reply
                at.refused.pop(spec.root, None)
            elif isinstance(reply, p.Error) and spec.root in at.refused:
                at.refused[spec.root] = time.monotonic()
            elif isinstance(reply, p.Error):
                at.refused[spec.root] = time.monotonic()
                logger.warning("%s: %s is not cached: %s", self.name, spec.model, reply.message)

        request = p.Join(at.session, spec.root, spec.model, list(spec.parts), spec.tokens)
        return Call(lambda now: request if now is at else None, time.monotonic() + self.patience, joined)

    def _leaving(self, root: bytes, deadline: float) -> Call:
        def left(at: Attachment | None, reply: p.Reply | None) -> None:
            if at is not None and reply is not None:
                at.groups.pop(root, None)

        return Call(lambda at: p.Leave(at.session, at.groups[root].group), deadline, left)

    def _lose(self, why: str) -> None:
        logger.warning("%s: the session with the cache server is over: %s", self.name, why)
        self.state, self.attachment = State.LOST, None
        self._next_beat = 0.0
        for end in dict.fromkeys(self._ends.values()):
            self._ended(end, None)


def _map(path: str, size: int) -> mmap.mmap:
    """Raises OSError: it is gone, or not of that size."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size != size:
            raise OSError(f"{path} has {os.fstat(fd).st_size} bytes, expected {size}")
        return mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    finally:
        os.close(fd)
