"""What the server does about each request: the directory, its owners, and the tiers below.

One thread owns all of this. Nothing blocks: `handle` takes one request to its reply, `tick` is called in between.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_ext.engine import Chunk, Lower, Outcome, Want
from lmcache_ext.metrics import Recorder
from lmcache_ext.policies import POLICIES
from lmcache_ext.server import protocol as p
from lmcache_ext.server.directory import SharedDirectory, group_of
from lmcache_ext.server.groups import Groups
from lmcache_ext.server.journal import Journal
from lmcache_ext.server.memory import Arena, Group, Segment, Stake, parts_of
from lmcache_ext.server.owners import NoSuchProcess, Session, Ticket, Watch, this_process
from lmcache_ext.server.state import Refused, Setup, Tally

logger = logging.getLogger("lmcache_ext.server")

_MAX_SESSIONS, _MAX_TICKETS, _MAX_ASKS, _MAX_PROCESSES = 1024, 1 << 16, 4096, 4096
_LOOK_SECONDS = 0.1  # between two looks who is dead or silent
_GRACE = 1.0  # seconds after its deadline that an ask which nobody repeats is kept


class Service:
    """The server without its sockets."""

    def __init__(self, setup: Setup, segment: Segment) -> None:
        self.setup, self.segment = setup, segment
        self.boot = os.urandom(16)
        self.began = time.monotonic()
        self.journal = Journal()
        arena = Arena(setup.nbytes, setup.extent_bytes)
        self.directory = SharedDirectory(POLICIES.get(setup.policy)(), arena, self.journal)
        self.recorder, self.tally, self.watch = Recorder(), Tally(), Watch()
        self.sessions: dict[bytes, Session] = {}
        self.groups = Groups(self.directory, setup.extent_bytes)
        self.lower: Lower | None = None
        if setup.levels:
            self.lower = Lower(self.directory, setup.levels, self._parts, self.recorder, only_faster=False)
        self.figures: Callable[[], bytes] = lambda: b"{}"
        self._me = this_process()
        self._looked = 0.0
        self._do: dict[type, Callable[[Session, Any], p.Reply]] = {
            p.Adopt: self._adopt, p.Join: self._join, p.Leave: self._leave,
            p.Lookup: self._lookup, p.Lease: self._lease,
            p.Release: self._release, p.Prepare: self._prepare, p.Complete: self._complete, p.Drop: self._drop,
            p.Touch: self._touch, p.Clear: self._clear, p.Quota: self._quota, p.Bye: self._bye,
            p.Departures: self._departures,
            p.Stats: lambda session, ask: p.Figures(self.figures()), p.Ping: lambda session, ask: p.Done(),
        }  # fmt: skip

    # -- one request ------------------------------------------------------------------------------------------------

    def handle(self, frames: Sequence[bytes]) -> list[bytes]:
        """The frames of the reply to the frames of a request, whatever these are."""
        number = 0
        try:
            if len(frames) != 2 or len(frames[0]) != p.REQUEST.size:
                raise Refused("malformed", f"a request is a header of {p.REQUEST.size} bytes and a body")
            magic, version, number, deadline = p.REQUEST.unpack(frames[0])
            if magic != p.MAGIC:
                raise Refused("malformed", "no header of this protocol")
            if version != p.VERSION:
                raise Refused("version", f"version {version} is not spoken here, but {p.VERSION}")
            reply = self._carry_out(number, deadline, p.unpack_request(frames[1]))
        except Refused as refusal:
            reply = self._error(refusal.kind, str(refusal))
        except NoSuchProcess as why:
            reply = self._error("refused", str(why))
        except (ValueError, RecursionError) as error:  # msgspec's are ValueErrors
            reply = self._error("malformed", str(error))
        except Exception as error:
            logger.exception("a fault of the server's own")
            reply = self._error("internal", f"{type(error).__name__}: {error}")
        return p.pack_reply(number, self.boot, reply)

    def _error(self, kind: str, message: str) -> p.Error:
        self.tally.errors[kind] = self.tally.errors.get(kind, 0) + 1
        return p.Error(kind, message[:500])

    def _carry_out(self, number: int, deadline: int, request: p.Request) -> p.Reply:
        name = type(request).__name__.lower()
        self.tally.requests[name] = self.tally.requests.get(name, 0) + 1
        now = time.monotonic()
        late = bool(deadline) and deadline < now * 1e9
        if isinstance(request, p.Hello):
            if late:
                raise Refused("late", "its deadline has passed")
            return self._hello(request, now)
        session = self.sessions.get(request.session)
        if session is None:
            raise Refused("session", "not known here: say hello")
        session.heard = now
        if number <= session.newest:
            raise Refused("stale", f"request {session.newest} came before {number}")
        session.newest = number
        if late:
            raise Refused("late", "its deadline has passed")
        return self._do[type(request)](session, request)

    # -- sessions ---------------------------------------------------------------------------------------------------

    def _hello(self, hello: p.Hello, now: float) -> p.Reply:
        if len(self.sessions) >= _MAX_SESSIONS:
            raise Refused("refused", f"there are {len(self.sessions)} sessions, as many as can be")
        session = Session(os.urandom(16), hello.name, now, now)
        self._watch(session, hello.processes)
        self.sessions[session.token] = session
        logger.info("%s is here", session.name)
        setup, path = self.setup, self.segment.path
        size, extent = self.segment.nbytes, setup.extent_bytes
        return p.Welcome(session.token, self._me, path, size, setup.chunk_size, setup.silence, extent)

    def _adopt(self, session: Session, ask: p.Adopt) -> p.Reply:
        if len(session.processes) + len(ask.processes) > 256:
            raise Refused("refused", "a session has at most 256 processes")
        self._watch(session, ask.processes)
        return p.Done(len(session.processes))

    def _watch(self, session: Session, processes: Sequence[p.Process]) -> None:
        if len(self.watch) + len(processes) > _MAX_PROCESSES:
            raise Refused("refused", f"{len(self.watch)} processes are watched, as many as can be")
        self.watch.add(session, processes)

    def _bye(self, session: Session, ask: p.Bye) -> p.Reply:
        held = session.holds
        self._end(session, "said goodbye")
        return p.Done(held)

    def _end(self, session: Session, why: str) -> None:
        """Nobody of the session touches a slot any more."""
        for ticket in list(session.tickets):
            self._give_back(session, ticket)
        for ask in list(session.asks):
            self._let_go(session, ask)
        self.watch.drop(session)
        del self.sessions[session.token]
        logger.info("%s %s", session.name, why)

    def tick(self) -> None:
        """Let tiers go on, and see who is dead or silent. Call it at least every 50 ms, every 2 ms while `busy`."""
        if self.lower:
            self.lower.poll()
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        for session in self.watch.dead():
            self.tally.proven_dead += 1
            self._end(session, f"is dead; it held {session.holds} chunks")
        for session in list(self.sessions.values()):
            for ask in [ask for ask, until in session.asks.items() if until < now]:
                self._let_go(session, ask)
            self._hear(session, now)

    def _hear(self, session: Session, now: float) -> None:
        """Who is silent keeps its slots, but what it was writing can be written by others, elsewhere."""
        quiet = now - session.heard > self.setup.silence
        if quiet and not session.tickets:
            self._end(session, "is silent and holds nothing")
        elif quiet and not session.silent:
            logger.warning("%s is silent; the %d chunks that it holds are left alone", session.name, session.holds)
            for ticket in session.tickets.values():
                if ticket.writes:
                    self.tally.quarantined += sum(chunk is not None for chunk in ticket.chunks)
                    for chunk in ticket.chunks:
                        if chunk is not None:
                            self.directory.abandon(chunk)
        session.silent = quiet

    @property
    def busy(self) -> bool:
        """Whether tiers are at work."""
        return bool(self.lower and (self.lower.busy or any(session.asks for session in self.sessions.values())))

    # -- groups -----------------------------------------------------------------------------------------------------

    def _join(self, session: Session, join: p.Join) -> p.Reply:
        group = self.groups.join(join, used=set().union(*(each.groups for each in self.sessions.values())))
        session.groups.add(group.number)
        return p.Joined(group.number, group.slot_bytes, list(group.starts))

    def _leave(self, session: Session, ask: p.Leave) -> p.Reply:
        session.groups.discard(self._group(session, ask.group).number)
        return p.Done()

    def _group(self, session: Session, number: int) -> Group:
        if number not in session.groups:
            raise Refused("group", f"group {number} was not joined")
        return self.groups[number]

    def _parts(self, offset: int, tokens: int) -> Any:
        return parts_of(self.segment, self.directory.arena.stake(offset), offset, tokens)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _lookup(self, session: Session, ask: p.Lookup) -> p.Reply:
        group = self._group(session, ask.group)
        chains = [p.split_keys(each.keys) for each in ask.asks]
        if sum(map(len, chains)) > p.MAX_KEYS:
            raise Refused("malformed", f"at most {p.MAX_KEYS} keys at once")
        for each in ask.asks:
            if each.ticket:
                self._require_new(session, each.ticket)
        answers = [self._answer(session, group, each, keys) for each, keys in zip(ask.asks, chains, strict=True)]
        return p.Found(answers, self.journal.count)

    def _answer(self, session: Session, group: Group, ask: p.Ask, keys: list[bytes]) -> p.Answer:
        ready = self._ready(group, keys)
        if ready < len(keys) and self.lower and (ask.wait or ask.id in session.asks):
            if self._fetch(self.lower, session, group, ask, keys, ready):
                return p.Answer(ready, True)
            ready = self._ready(group, keys)
        offsets = b""
        if ask.ticket and ready and ask.ticket not in session.tickets:
            chunks = self.directory.lease(keys[:ready])
            assert chunks is not None
            offsets = self._leased(session, ask.ticket, group, chunks)
        self._let_go(session, ask.id)
        self.tally.lookups += 1
        self.tally.lookup_chunks += len(keys)
        self.tally.hit_chunks += ready
        return p.Answer(ready, False, offsets)

    def _ready(self, group: Group, keys: list[bytes]) -> int:
        """Leading chunks that are there and are the group's."""
        find = self.directory.ready
        for i, key in enumerate(keys):
            chunk = find(key)
            if chunk is None or group_of(chunk) is not group:
                return i
        return len(keys)

    def _fetch(self, lower: Lower, session: Session, group: Group, ask: p.Ask, keys: list[bytes], ready: int) -> bool:
        if ask.id not in session.asks:
            if len(session.asks) >= _MAX_ASKS:
                return False
            session.asks[ask.id] = time.monotonic() + ask.wait + _GRACE
        stake = Stake(group, ask.salt)
        wants = [Want(key, group.tokens, stake) for key in keys[ready:]]
        if ask.last and ask.last < group.tokens:
            wants[-1] = Want(keys[-1], ask.last, stake)
        return lower.fetch(_owner(session, ask.id), wants, ask.wait, after=keys[:ready])

    def _let_go(self, session: Session, ask: str) -> None:
        if session.asks.pop(ask, None) is not None and self.lower:
            self.lower.release(_owner(session, ask))

    def _lease(self, session: Session, ask: p.Lease) -> p.Reply:
        group, keys = self._group(session, ask.group), p.split_keys(ask.keys)
        self._require_new(session, ask.ticket)
        chunks = self.directory.lease(keys) if self._ready(group, keys) == len(keys) else None
        return p.Leased(self._leased(session, ask.ticket, group, chunks) if chunks else b"")

    def _leased(self, session: Session, ticket: int, group: Group, chunks: list[Chunk]) -> bytes:
        session.tickets[ticket] = Ticket(list(chunks), False, time.monotonic())
        self.tally.leased_chunks += len(chunks)
        self.tally.leased_bytes += len(chunks) * sum(group.parts)
        return p.pack_offsets([chunk.slot for chunk in chunks])

    def _require_new(self, session: Session, ticket: int) -> None:
        if ticket in session.tickets or not ticket:
            raise Refused("ticket", f"ticket {ticket} can't be used" + (" again" if ticket else ""))
        if len(session.tickets) >= _MAX_TICKETS:
            raise Refused("refused", f"a session has at most {_MAX_TICKETS} tickets")

    def _release(self, session: Session, ask: p.Release) -> p.Reply:
        for name in ask.asks:
            self._let_go(session, name)
        return p.Done(sum(self._give_back(session, ticket) for ticket in ask.tickets))

    def _give_back(self, session: Session, number: int) -> bool:
        ticket = session.tickets.pop(number, None)
        if ticket is None:
            return False
        chunks = [chunk for chunk in ticket.chunks if chunk is not None]
        if ticket.writes:
            for chunk in chunks:
                self.directory.complete_store(chunk, False)
        else:
            self.directory.release(chunks)
        return True

    # -- writing ----------------------------------------------------------------------------------------------------

    def _prepare(self, session: Session, ask: p.Prepare) -> p.Reply:
        group, keys = self._group(session, ask.group), p.split_keys(ask.keys)
        self._require_new(session, ask.ticket)
        stake, offsets = Stake(group, ask.salt), []
        chunks: list[Chunk | None] = []
        for i, key in enumerate(keys):
            last = i == len(keys) - 1 and 0 < ask.last < group.tokens
            made = self.directory.prepare_store(key, ask.last if last else group.tokens, stake)
            if isinstance(made, Chunk):
                offsets.append(made.slot)
                chunks.append(made)
                continue
            chunks.append(None)
            why = p.QUOTA if self.directory.over(stake) else p.FULL
            offsets.append(p.EXISTS if made is Outcome.EXISTS else why)
            self.tally.refused_stores += made is not Outcome.EXISTS
        if any(chunk is not None for chunk in chunks):
            session.tickets[ask.ticket] = Ticket(chunks, True, time.monotonic())
        return p.Prepared(p.pack_offsets(offsets))

    def _complete(self, session: Session, ask: p.Complete) -> p.Reply:
        ticket = session.tickets.get(ask.ticket)
        if ticket is None or not ticket.writes:
            raise Refused("ticket", f"ticket {ask.ticket} is no reservation")
        del session.tickets[ask.ticket]
        failed, stored = set(ask.failed), []
        for i, chunk in enumerate(ticket.chunks):
            if chunk is not None:
                good = ask.success and i not in failed
                self.directory.complete_store(chunk, good)
                self.tally.failed_stores += not good
                if good and self.directory.ready(chunk.key) is chunk:
                    stored.append(chunk)
        self.tally.stored_chunks += len(stored)
        self.tally.stored_bytes += sum(sum(group_of(chunk).parts) for chunk in stored)
        if self.lower:
            self.lower.offer(stored)
        return p.Done(len(stored), self.journal.count)

    # -- the rest ---------------------------------------------------------------------------------------------------

    def _drop(self, session: Session, ask: p.Drop) -> p.Reply:
        group, count = self._group(session, ask.group), 0
        for key in p.split_keys(ask.keys):
            if self._ready(group, [key]):
                self.directory.drop(key)
                count += 1
        return p.Done(count)

    def _touch(self, session: Session, ask: p.Touch) -> p.Reply:
        self._group(session, ask.group)
        self.directory.touch(p.split_keys(ask.keys))
        return p.Done()

    def _clear(self, session: Session, ask: p.Clear) -> p.Reply:
        return p.Done(self.directory.forget(self._group(session, ask.group) if ask.group else None))

    def _departures(self, session: Session, ask: p.Departures) -> p.Reply:
        group = self._group(session, ask.group)
        left, at, missed = self.journal.since(ask.since, p.MAX_KEYS)
        gone = dict.fromkeys(key for whose, key in left if whose is group and not self._ready(group, [key]))
        return p.Departed(b"".join(gone), at, at < self.journal.count, missed)

    def _quota(self, session: Session, ask: p.Quota) -> p.Reply:
        if ask.limit is not None:
            self.directory.limit(ask.salt, None if ask.limit < 0 else ask.limit)
        used, limit = self.directory.arena.by_salt.get(ask.salt, 0), self.directory.limits.get(ask.salt, -1)
        return p.Share(used, limit)

    def check(self) -> list[str]:
        """Every broken invariant, as a sentence; [] if all is well. O(slots)."""
        return self.directory.check()

    def close(self) -> None:
        """The server ends: what is on its way to tiers has a few seconds."""
        for session in list(self.sessions.values()):
            self.watch.drop(session)
        if self.lower:
            self.lower.close(5.0)
        self.segment.close()


def _owner(session: Session, ask: str) -> str:
    return f"{session.token.hex()}/{ask}"
