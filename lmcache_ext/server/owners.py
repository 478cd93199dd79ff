"""Who holds what, and when it is certain that they do not any more.

A session holds leases and reservations. It ends by its own word, or when each of its processes has been proven dead:
the kernel says so through a pidfd, which stands for one process and never for a later one of the same number. Silence
ends nothing: a process that is stopped may go on at any time with the copy that it was making.
"""

from __future__ import annotations

import os
import select
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache_ext.processes import started, watch
from lmcache_ext.server.protocol import Process

if TYPE_CHECKING:  # clients come here, too, and need no engine
    from lmcache_ext.engine import Chunk


class NoSuchProcess(Exception):
    """A process can't be watched; the message says why."""


def this_process() -> Process:
    """The caller."""
    pid = os.getpid()
    return Process(pid, started(pid) or 0)


@dataclass(eq=False)
class Ticket:
    """One lease or reservation."""

    chunks: list[Chunk | None]  # None: a key of a reservation that needed no slot
    writes: bool
    began: float


@dataclass(eq=False)
class Session:
    """One client."""

    token: bytes
    name: str
    born: float
    heard: float
    newest: int = -1  # number of the latest request
    silent: bool = False
    processes: dict[Process, int] = field(default_factory=dict)  # → pidfd
    tickets: dict[int, Ticket] = field(default_factory=dict)
    asks: dict[str, float] = field(default_factory=dict)  # that tiers work on → until when
    groups: set[int] = field(default_factory=set)

    @property
    def holds(self) -> int:
        """Chunks that can't be reused because of it."""
        return sum(chunk is not None for ticket in self.tickets.values() for chunk in ticket.chunks)

    @property
    def writes(self) -> int:
        """Those of them that it is writing."""
        return sum(chunk is not None for each in self.tickets.values() if each.writes for chunk in each.chunks)


class Watch:
    """Watches the processes of all sessions. One thread; nothing blocks."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._of: dict[int, tuple[Session, Process]] = {}  # by pidfd

    def __len__(self) -> int:
        return len(self._of)

    def add(self, session: Session, processes: Iterable[Process]) -> None:
        """Watch these for `session`. All or none.

        Raises:
            NoSuchProcess: one is not there, or was not asked for.
        """
        opened: dict[Process, int] = {}
        try:
            for process in processes:
                if process not in session.processes and process not in opened:
                    opened[process] = _pidfd(process)
        except NoSuchProcess:
            for fd in opened.values():
                os.close(fd)
            raise
        for process, fd in opened.items():
            session.processes[process] = fd
            self._of[fd] = (session, process)
            self._poll.register(fd, select.POLLIN)

    def dead(self) -> list[Session]:
        """Sessions whose last process was found dead since the last call."""
        ended = []
        for fd, _ in self._poll.poll(0):
            session, process = self._of[fd]
            self._close(fd)
            del session.processes[process]
            if not session.processes:
                ended.append(session)
        return ended

    def drop(self, session: Session) -> None:
        """It is over."""
        for fd in session.processes.values():
            self._close(fd)
        session.processes.clear()

    def _close(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._of[fd]
        os.close(fd)


def _pidfd(process: Process) -> int:
    """Raises NoSuchProcess unless it is the one that was meant."""
    try:
        return watch(process.pid, process.started)
    except OSError as error:
        raise NoSuchProcess(
            f"process {process.pid} can't be watched: {error.strerror}; server and clients must see each other's "
            "processes (one host, one PID namespace)"
        ) from None
