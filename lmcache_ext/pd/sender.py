"""The prefill side of a hand-over: gets slots from receivers, writes chunks there once they are ready, tells the proxy.

`begin` as soon as a request's keys are known, `ready` as each chunk is complete in a slot of ours, and `poll` for what
came of it. Sums are taken in a thread of their own, before the bytes leave. One more thread owns the agent, the sockets
and all state; it waits for messages, never for a peer, and each thing that it expects has a deadline. No lock is held
over a wait: what callers say goes through a queue.

A receiver that does not answer costs the requests that wait for it their deadline, once. Then it is out (a breaker),
until one request has tried it again. Its connection is cut, so that its slots are its own again, should it live.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence

import zmq

from lmcache_ext.pd.agent import Agent, Memory
from lmcache_ext.pd.handover import Ended, Event, Handover, Outcome, Released, Target, Together
from lmcache_ext.pd.links import Links
from lmcache_ext.pd.options import SenderOptions, Sums
from lmcache_ext.pd.parts import Misfit
from lmcache_ext.pd.ports import Waker
from lmcache_ext.pd.sums import Summed, Summer
from lmcache_ext.pd.wire import KEY_BYTES, MAX_ID, Geometry

logger = logging.getLogger("lmcache_ext.pd")

_IDLE_S = 0.1  # between two looks at deadlines
_NAP_S = 0.0002  # between two looks at a transfer


class Sender:
    """Runs from construction to `close`. All methods may be called from any thread, and none of them waits but `close`.

    Args:
        memory: this rank's slots.
        take_sums: of slots; `sums.of_pool` for a host pool, `GpuSums` for a GPU's memory.
        geometry: of the slots; receivers refuse one that does not fit theirs.
        options: bounds and deadlines, and the proxy.

    Raises:
        ConfigError: NIXL is missing or does not start.
    """

    def __init__(self, memory: Memory, take_sums: Sums, geometry: Geometry, options: SenderOptions) -> None:
        self.geometry = geometry
        self._options = options
        self._said: deque[Callable[[], None]] = deque()  # by callers, for the thread
        self._events: deque[Event] = deque()
        self._numbers = itertools.count()
        self._going: dict[tuple[str, Target], Handover] = {}  # the thread's, as all below
        self._waker = Waker()
        self.counts: Counter[str] = Counter()
        """What happened, by kind. Read from any thread."""
        self._context = zmq.Context()
        self._links = Links(Agent(memory, receives=False, backends=options.backends), self._context, geometry, options)
        self._links.on_taken, self._links.on_end, self._links.on_landed = self._taken, self._end, self._landed
        self._links.counts = self.counts
        self._poller = self._links.poller
        self._poller.register(self._waker.fd, zmq.POLLIN)
        self._enter = memory.enter
        self._summer = Summer(take_sums, self._waker, memory.enter)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lmcache-pd-sender", daemon=True)
        self._thread.start()

    # -- from any thread --------------------------------------------------------------------------------------------

    def begin(
        self, req_id: str, target: Target, keys: Sequence[bytes], last_tokens: int | None = None,
        together: Together | None = None,
    ) -> None:  # fmt: skip
        """Hand a request's chunks over to one rank. Exactly one `Ended` will tell how that went.

        Args:
            req_id: as the proxy knows it.
            target: where to; the two are not under way already.
            keys: of its chunks, in their order, all different.
            last_tokens: how many tokens the last chunk has; None: it is full.
            together: what the proxy is told; None: how this one went, of this sender's rank.

        Raises:
            ValueError: this can't be meant.
        """
        last = self.geometry.chunk_tokens if last_tokens is None else last_tokens
        if not keys or len(set(keys)) < len(keys) or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"{len(keys)} keys: at least one, all of {KEY_BYTES} bytes and different")
        if not 1 <= last <= self.geometry.chunk_tokens or not 0 < len(req_id) <= MAX_ID:
            raise ValueError(f"a last chunk of {last} tokens, an id of {len(req_id)} characters")
        due = time.monotonic() + self._options.stall_s
        handover = Handover(next(self._numbers), req_id, target, list(keys), last, due, together)
        self._say(lambda: self._begin(handover))

    def ready(self, req_id: str, target: Target, index: int, slot: int) -> None:
        """Chunk `index` is complete in our `slot`, which must stay as it is until `Released`."""
        self._say(lambda: self._ready((req_id, target), index, slot))

    def cancel(self, req_id: str, target: Target) -> None:
        """The request is not wanted any more. It ends as CANCELLED unless it has ended."""
        self._say(lambda: self._cancel((req_id, target)))

    def lose(self, req_id: str, target: Target, indexes: Collection[int], why: str) -> None:
        """These chunks are not ready and will never be. The others are handed over all the same; then it ends as LOST,
        and the proxy is told."""
        self._say(lambda: self._lose((req_id, target), set(indexes), why))

    def tell(self, req_id: str, stored: bool, ranks: Sequence[int] = ()) -> None:
        """Word to the proxy about a request that has nothing to hand over."""
        self._say(lambda: self._links.notify(req_id, stored, ranks))

    def poll(self) -> list[Event]:
        """What happened since the last call."""
        events: list[Event] = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def close(self, timeout: float) -> bool:
        """Cancel everything and end. False if the thread did not end in time: then the slots are still in use."""
        self._stop.set()
        self._waker.wake()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _say(self, what: Callable[[], None]) -> None:
        self._said.append(what)
        self._waker.wake()

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._enter()
        try:
            while not self._stop.is_set():
                self._turn(_IDLE_S)
            for handover in list(self._going.values()):
                self._end(handover, Outcome.CANCELLED, "the sender closes")
            while self._links.flying or any(each.summing for each in self._going.values()):
                self._turn(_NAP_S)  # each flight has a deadline
        finally:
            self._summer.close(1.0)
            self._links.close()
            self._context.destroy(0)
            self._waker.close()

    def _turn(self, idle_s: float) -> None:
        try:
            flying = self._links.flying
            readable = dict(self._poller.poll(0 if flying or self._links.more else int(idle_s * 1000)))
            if flying and not (readable or self._links.more):
                time.sleep(_NAP_S)
            self._waker.clear()
            self._links.hear(readable)
            for _ in range(len(self._said)):
                self._said.popleft()()
            for _ in range(len(self._summer.done)):
                self._summed(self._summer.done.popleft())
            self._links.move()
            now = time.monotonic()
            if self._links.look(now):
                for handover in [each for each in self._going.values() if each.outcome is None and each.due <= now]:
                    self._end(handover, Outcome.TIMEOUT, f"nothing happened for {self._options.stall_s:g} s")
        except Exception:
            # One request must not end the service for all; what it was about runs into its deadline.
            self.counts["fault"] += 1
            logger.exception("sender")

    def _begin(self, handover: Handover) -> None:
        name = (handover.req_id, handover.target)
        if name in self._going:
            self._events.append(Ended(handover.req_id, Outcome.REFUSED, "under way already", 0, 0))
            return
        self._going[name] = handover
        try:
            self._links.begin(handover)
        except Misfit as error:
            self._end(handover, Outcome.REFUSED, str(error))
        except Exception as error:  # as where the receiver's host is no host at all
            logger.exception("no way to %s", handover.target)
            self._end(handover, Outcome.DEAD, str(error))

    def _ready(self, name: tuple[str, Target], index: int, slot: int) -> None:
        handover = self._going.get(name)
        if handover is None or handover.outcome is not None or index not in handover.left or index in handover.slots:
            self._events.append(Released(name[0], index, slot))
            return
        runs = self._links.plan(handover.target).runs(handover.tokens(index, self.geometry), at_receiver=False)
        handover.slots[index] = slot
        handover.due = time.monotonic() + self._options.stall_s
        handover.summing.add(index)
        self._summer.ask(handover, index, slot, runs)

    def _summed(self, summed: Summed) -> None:
        handover, index = summed.handover, summed.index
        handover.summing.discard(index)
        if summed.error:
            self._end(handover, Outcome.BROKEN, summed.error)
        elif handover.outcome is None and index in handover.left:
            handover.sums[index] = summed.total
            handover.queued.append(index)
        else:
            self._release(handover, index)
        self._forget(handover)

    def _cancel(self, name: tuple[str, Target]) -> None:
        handover = self._going.get(name)
        if handover is not None:
            self._end(handover, Outcome.CANCELLED, "cancelled")

    def _lose(self, name: tuple[str, Target], indexes: set[int], why: str) -> None:
        handover = self._going.get(name)
        if handover is not None and handover.outcome is None:
            handover.lost |= handover.left & indexes - handover.slots.keys()
            handover.left -= handover.lost
            handover.why = why
            self._end_if_done(handover)

    # -- what links tell --------------------------------------------------------------------------------------------

    def _taken(self, handover: Handover, indexes: Sequence[int]) -> None:
        """These chunks are visible at the receiver, written by us or by others."""
        handover.due = time.monotonic() + self._options.stall_s
        handover.left.difference_update(indexes)
        for index in set(indexes) - handover.summing:
            self._release(handover, index)
        self._end_if_done(handover)

    def _end_if_done(self, handover: Handover) -> None:
        if not handover.left:
            self._end(handover, Outcome.LOST if handover.lost else Outcome.STORED, handover.why)

    def _landed(self, handover: Handover, indexes: Sequence[int]) -> None:
        """These chunks are not in flight any more."""
        for index in indexes:
            self._release(handover, index)
        self._forget(handover)

    def _release(self, handover: Handover, index: int) -> None:
        slot = handover.slots.get(index, -1)
        if slot >= 0:
            handover.slots[index] = -1  # it was ready, and is not ours any more
            self._events.append(Released(handover.req_id, index, slot))

    def _end(self, handover: Handover, outcome: Outcome, text: str) -> None:
        if handover.outcome is not None:
            return
        handover.outcome = outcome
        self.counts[outcome.value] += 1
        if outcome not in (Outcome.STORED, Outcome.CANCELLED):
            logger.warning("hand-over of %s to %s: %s, %s", handover.req_id, handover.target, outcome.value, text)
        sent = max(0, len(handover.keys) - len(handover.left | handover.lost) - handover.skipped)
        self._events.append(Ended(handover.req_id, outcome, text, sent, handover.skipped))
        self._links.tell(handover)
        handover.queued.clear()
        for index in handover.slots.keys() - handover.summing - handover.flying:
            self._release(handover, index)
        self._links.end(handover)
        self._forget(handover)

    def _forget(self, handover: Handover) -> None:
        if handover.outcome is not None and handover.still:
            self._links.forget(handover)
            name = (handover.req_id, handover.target)
            if self._going.get(name) is handover:
                del self._going[name]
