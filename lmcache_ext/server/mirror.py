"""An engine's part of a server's directory: the chunks that it holds there, to read or to write.

It stands where an engine of its own has its `Directory`, and answers at once from what the server has granted: a chunk
is ready here while a look-up holds it, and a slot can be written once the server has given one. What is not granted yet
is a miss, or a store to be tried again in the next step. A `Seeker` (seeker.py) stands where tiers do.

    Seeker.fetch ──Lookup──▶ server ──lease──▶ found here ──lease, release──▶ Release, once nobody reads it any more
    prepare_store ──Prepare──▶ server ──slot──▶ granted ──complete_store──▶ Complete, once all of a grant are written
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lmcache_ext.engine import Chunk, Directory, Outcome, Slots, State, Want
from lmcache_ext.events import Announcement
from lmcache_ext.policies import POLICIES
from lmcache_ext.server import protocol as p
from lmcache_ext.server.client import Client, Grant, Reserving
from lmcache_ext.server.link import Attachment, Call
from lmcache_ext.server.news import News
from lmcache_ext.transfer.segment import PAGE

_KEEP_STEPS = 8  # a slot that no store took within so many goes back
_KEEP_SECONDS = 0.5  # what else the server said of a store is forgotten after so long
_WRITE_SECONDS = 60.0  # that all of a reservation may take to be written; stores have shorter deadlines
_ANSWER_SECONDS = 2.0  # that the server may take to know what was written
_MOST_AT_ONCE = 64  # keys in one reservation: its chunks are published together


@dataclass(frozen=True)
class Note:
    """What is known of a chunk. Chunks of one owner are reserved, and then published, together.

    Args:
        salt: the digest of its salt.
        owner: who stores it.
        what: what to tell routers of it.
    """

    salt: bytes = b""
    owner: str = ""
    what: Announcement | None = field(default=None, compare=False)


@dataclass(eq=False)
class Held:
    """One lease of the server's. `open`: the look-up that brought it, and every load that reads from it."""

    grant: Grant
    chunks: list[Chunk]
    open: int = 1


@dataclass(eq=False)
class _Writing:
    """One reservation of the server's, with the keys whose fate is still open."""

    grant: Grant
    open: set[int]
    failed: list[int]
    begun: float = field(default_factory=time.monotonic)
    call: Call | None = None  # once the server is told
    told: float = 0.0


@dataclass(eq=False)
class _Asked:
    """One reservation that the server was asked for."""

    keys: list[bytes]
    reserving: Reserving


@dataclass(frozen=True)
class _Answer:
    """What the server said of a store: a slot, or why there is none."""

    at: float  # monotonic
    step: int
    offset: int  # or EXISTS, FULL, QUOTA
    writing: _Writing | None = None
    index: int = 0


class Mirror(Directory):
    """Not thread-safe, never blocks, as its base. `version` changes with what is found here. A chunk's `slot` is the
    number of the memory page at which the server's slot begins, as `transfer.segment` has it.

    Args:
        client: of the server; joined to groups by whoever makes this one.
        root: of the group that chunks go to.
        news: is told what can be found at the server.
    """

    def __init__(self, client: Client, root: bytes, news: News | None = None) -> None:
        super().__init__(POLICIES.get("LRU")(), slots=Slots())
        self._news = news
        self.client = client
        self.root = root
        self.usable: Attachment | None = None  # the session whose memory the workers can use; None: nothing is cached
        self._found: dict[bytes, list[Chunk]] = {}  # ready, by key: each look-up has its own
        self._held: dict[Chunk, Held] = {}
        self._writes: dict[Chunk, tuple[_Writing, int]] = {}
        self._wanted: dict[bytes, tuple[int, object]] = {}  # stores to ask for: tokens and note
        self._asked: list[_Asked] = []
        self._asking: set[bytes] = set()
        self._answers: dict[bytes, _Answer] = {}
        self._abandoned: dict[bytes, _Writing] = {}  # what we gave up, and the server still takes for being written
        self._step = 0
        self._publishing: dict[Chunk, _Writing] = {}  # written, and the server has not said that it knows

    @property
    def asks(self) -> bool:
        """Whether the server can be asked for slots now."""
        return self.usable is not None and self.client.up

    def use(self, attachment: Attachment | None) -> None:
        """From now on chunks are in this session's memory; None: in nobody's."""
        if attachment is not self.usable:
            self.usable = attachment
            self.clear()

    # -- looking ----------------------------------------------------------------------------------------------------

    def match(self, keys: Sequence[bytes]) -> int:
        for i, key in enumerate(keys):
            if key not in self._found:
                return i
        return len(keys)

    def ready(self, key: bytes) -> Chunk | None:
        found = self._found.get(key)
        return found[-1] if found else None

    def coming(self, key: bytes) -> bool:
        return any(chunk.key == key for chunk in self._writes)

    def touch(self, keys: Iterable[bytes]) -> None:
        if self.client.up and (some := list(keys)[: p.MAX_KEYS]):
            self.client.touch(self.root, some)

    def chunks(self) -> list[Chunk]:
        return [found[-1] for found in self._found.values()]

    def __len__(self) -> int:
        return len(self._found)

    @property
    def used(self) -> int:
        return len(self._held) + len(self._writes)

    # -- reading ----------------------------------------------------------------------------------------------------

    def found(self, grant: Grant, wants: Sequence[Want]) -> Held:
        """The server has leased these to us."""
        chunks = [
            Chunk(want.key, offset // PAGE, want.tokens, want.note, State.READY, leases=0, uses=0)
            for want, offset in zip(wants, grant.offsets, strict=False)
        ]
        held = Held(grant, chunks)
        for chunk in chunks:
            self._held[chunk] = held
            self._found.setdefault(chunk.key, []).append(chunk)
        self._tell(chunks, grant.at)
        self.version += 1
        return held

    def leave(self, held: Held) -> None:
        """One fewer reads from this lease."""
        held.open -= 1
        if held.open:
            return
        for chunk in held.chunks:
            self._hide(chunk)
            del self._held[chunk]
        self.client.release(held.grant)

    def _hide(self, chunk: Chunk) -> None:
        found = self._found.get(chunk.key, [])
        if chunk in found:
            found.remove(chunk)
            self.version += 1
            if not found:
                del self._found[chunk.key]

    def lease(self, keys: Sequence[bytes]) -> list[Chunk] | None:
        chunks = [chunk for key in keys if (chunk := self.ready(key)) is not None]
        if len(chunks) < len(keys):
            return None
        for chunk in chunks:
            chunk.leases += 1
            self._held[chunk].open += 1
        self.leases += len(chunks)
        return chunks

    def hold(self, chunk: Chunk) -> bool:
        """Nobody but the server writes back."""
        return False

    def release(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            chunk.leases -= 1
            self.leases -= 1
            self.leave(self._held[chunk])

    # -- writing ----------------------------------------------------------------------------------------------------

    def prepare_store(self, key: bytes, tokens: int, note: object = None) -> Chunk | Outcome:
        """As the base's, with a `Note`. FULL also while the server has not answered: try again."""
        if key in self._asking:
            self._listen()
        if self._gives_up(key):
            return Outcome.FULL
        answer = self._answers.get(key)
        if key in self._found or (answer and answer.offset == p.EXISTS):
            return Outcome.EXISTS
        if answer is None:
            self.expect(key, tokens, note)
            return Outcome.FULL
        if answer.writing is None:
            return Outcome.FULL
        del self._answers[key]
        chunk = Chunk(key, answer.offset // PAGE, tokens, note, State.RESERVED, leases=1, uses=0)
        self._writes[chunk] = (answer.writing, answer.index)
        self.leases += 1
        return chunk

    def expect(self, key: bytes, tokens: int, note: object = None) -> None:
        known = key in self._asking or key in self._answers or key in self._found
        if self.asks and not known and not self._gives_up(key):
            self._wanted[key] = (tokens, note)

    def _gives_up(self, key: bytes) -> bool:
        """Whether the server has not yet heard that we gave up writing this one: it would say that it exists."""
        writing = self._abandoned.get(key)
        if writing is not None and writing.call is not None and writing.call.done.is_set():
            del self._abandoned[key]
            return False
        return writing is not None

    def complete_store(self, chunk: Chunk, success: bool) -> None:
        writing, index = self._writes.pop(chunk)
        self.leases -= 1
        good = success and chunk.state is State.RESERVED
        if good:
            self._publishing[chunk] = writing
        self._written(writing, index, good)

    def abandon(self, chunk: Chunk) -> None:
        if chunk in self._writes:
            chunk.state = State.LEAVING
            self._abandoned[chunk.key] = self._writes[chunk][0]

    def _written(self, writing: _Writing, index: int, success: bool) -> None:
        writing.open.discard(index)
        if not success:
            writing.failed.append(index)
        if not writing.open:
            writing.call = self.client.complete(writing.grant, failed=sorted(writing.failed))
            writing.told = time.monotonic()

    def published(self, chunks: Sequence[Chunk]) -> bool | None:
        """As the base's. False also where the server does not answer within two seconds, or is another one by now, or
        others that were reserved with these are not written for long."""
        writings = [writing for chunk in chunks if (writing := self._publishing.get(chunk))]
        now = time.monotonic()
        if any(each.open and each.begun + _WRITE_SECONDS > now for each in writings):
            return None
        if any(each.call and not each.call.done.is_set() and each.told + _ANSWER_SECONDS > now for each in writings):
            return None
        known = 0
        for chunk in chunks:
            writing = self._publishing.pop(chunk, None)
            reply = writing.call.reply if writing and writing.call else None
            if not writing or not isinstance(reply, p.Done):
                continue
            if reply.count >= len(writing.grant.slots) - len(writing.failed):  # else some are not there any more
                known += 1
                self._tell([chunk], reply.at)
        return known == len(chunks)

    def _tell(self, chunks: Sequence[Chunk], at: int) -> None:
        if self._news:
            for chunk in chunks:
                if isinstance(chunk.note, Note) and chunk.note.what:
                    self._news.stored(chunk.key, chunk.note.what, at)

    def drop(self, key: bytes) -> None:
        for chunk in list(self._found.get(key, [])):
            self._hide(chunk)
        if key in self._answers:
            self._forget([key])
        self.client.drop(self.root, [key])

    def clear(self) -> int:
        """What is here is not found any more; what is being written never will be. The server keeps what it has."""
        count = len(self._found)
        for chunk in self._held:
            self._hide(chunk)
        for chunk in self._writes:
            self.abandon(chunk)
        self._wanted.clear()
        for asked in self._asked:  # what comes of it goes back unused
            asked.keys = [b""] * len(asked.keys)
        self._asking.clear()
        self._forget(list(self._answers))
        return count

    def grow(self, capacity: int) -> None:
        """It is the server's."""

    def flush(self) -> None:
        """Ask the server for the slots that this step could have used."""
        wanted, self._wanted = self._wanted, {}
        by_owner: dict[object, list[bytes]] = {}
        for key, (tokens, note) in wanted.items():
            if tokens < self.client.spec(self.root).tokens:
                self._ask([key], tokens, note)
            else:
                by_owner.setdefault(note, []).append(key)
        for note, keys in by_owner.items():
            for i in range(0, len(keys), _MOST_AT_ONCE):
                self._ask(keys[i : i + _MOST_AT_ONCE], 0, note)

    def _ask(self, keys: list[bytes], last: int, note: object) -> None:
        salt = note.salt if isinstance(note, Note) else b""
        reserving = self.client.prepare(self.root, keys, last=last, salt=salt)
        self._asked.append(_Asked(keys, reserving))
        self._asking.update(keys)

    # -- every step --------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """A step begins: take what the server answered, forget what is old."""
        self._step += 1
        self._listen()
        for key in list(self._abandoned):
            self._gives_up(key)
        now = time.monotonic()
        self._forget([key for key, answer in self._answers.items() if self._old(answer, now)])

    def _old(self, answer: _Answer, now: float) -> bool:
        if answer.writing:
            return answer.step + _KEEP_STEPS < self._step
        return answer.at + _KEEP_SECONDS < now

    def _listen(self) -> None:
        now = time.monotonic()
        for asked in [asked for asked in self._asked if asked.reserving.over]:
            self._asked.remove(asked)
            self._take(asked, now)

    def _take(self, asked: _Asked, now: float) -> None:
        self._asking.difference_update(asked.keys)
        grant = asked.reserving.grant
        if grant is None:
            return
        writing = _Writing(grant, set(grant.slots), [])
        for i, (key, offset) in enumerate(zip(asked.keys, grant.offsets, strict=True)):
            if offset < 0:
                self._answers[key] = _Answer(now, self._step, offset)
            elif not key or grant.attachment is not self.usable:
                self._written(writing, i, False)
            else:
                self._answers[key] = _Answer(now, self._step, offset, writing, i)

    def _forget(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            answer = self._answers.pop(key)
            if answer.writing:
                self._written(answer.writing, answer.index, False)

    @property
    def busy(self) -> bool:
        """Whether something was asked for or granted that only a later step can use."""
        return bool(self._asked or any(answer.writing for answer in self._answers.values()))

    def check(self, fix: bool = False) -> list[str]:
        """Every broken invariant, as a sentence."""
        faults = []
        if self.leases != sum(chunk.leases for chunk in self._held) + len(self._writes):
            faults.append(f"{self.leases} leases are counted")
        loads = {held: sum(chunk.leases for chunk in held.chunks) for held in self._held.values()}
        wrong = [held for held, count in loads.items() if not held.open or held.open not in (count, count + 1)]
        return [*faults, *(f"a lease of {len(held.chunks)} chunks is open {held.open} times" for held in wrong)]
