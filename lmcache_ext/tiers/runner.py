"""A tier over a medium whose calls block: threads, queues, deadlines, breakers, capacity, and the proof of every byte.

Work waits in two queues. Loads, look-ups that need I/O, deletions and probes come first; stores use all threads but
one, so that a load never waits behind stores alone. Stores wait while the first scan of a lasting medium runs, because
only then is it known how much room there is; look-ups and loads do not wait: until then the medium itself is asked.

Reads and writes have a breaker each: a disk that is full or read-only still gives back what it holds.

A medium that others write to and that has a bound of its own needs no index, unless a capacity is given: look-ups and
loads ask it, a store first asks whether somebody else was quicker, and nothing is listed, counted or evicted.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lmcache_ext.policies import POLICIES
from lmcache_ext.tiers.base import KEY_BYTES, Counts, JobResult, Kind, Outcome, Parts, Tier
from lmcache_ext.tiers.breaker import Breaker
from lmcache_ext.tiers.header import BLOCK, MAX_PARTS
from lmcache_ext.tiers.index import Index
from lmcache_ext.tiers.jobs import Job, Jobs
from lmcache_ext.tiers.medium import Medium
from lmcache_ext.tiers.objects import Done, Objects
from lmcache_ext.tiers.options import Options
from lmcache_ext.tiers.serde import Serde
from lmcache_ext.tiers.survey import Survey

logger = logging.getLogger("lmcache_ext.tiers")

_IDLE = 1.0  # seconds between two looks of an idle thread
_WRITING = (Kind.STORE, Kind.DELETE)
_FAULTS = (Outcome.FAILED, Outcome.CORRUPT)


@dataclass(frozen=True)
class Work:
    """What is to be done for one key, or for several in their order; `drop` instead, if it is too late for that."""

    call: Callable[[], list[Done]]
    drop: Callable[[], None] | None = None


@dataclass(frozen=True)
class Task:
    """Some keys of one job."""

    job: Job
    keys: tuple[int, ...]
    work: Work


class Runner(Tier):
    """A tier over `medium`.

    Args:
        medium: not opened yet.
        options: how the tier behaves.
        name: for the log.

    Raises:
        ConfigError: the medium can't be opened as it is set up.
    """

    def __init__(self, medium: Medium, options: Options, name: str) -> None:
        self.medium = medium
        self.options = options
        keeps = options.capacity is not None or not (medium.shared and medium.bounded)
        self.index = Index(POLICIES.get(options.policy)(), options.capacity, keeps)
        self._name = name
        self._jobs = Jobs()
        limits = (options.faults, options.cooldown, options.cooldown_max)
        self._reads = Breaker(f"reading from {name}", *limits)
        self._writes = Breaker(f"writing to {name}", *limits)
        self._more = threading.Condition()
        self._urgent: deque[Task | Callable[[], None]] = deque()  # guarded by _more, as all below
        self._stores: deque[Task] = deque()
        self._pending = dict.fromkeys(Kind, 0)
        self._storing = 0  # threads in a store
        self._closing = threading.Event()
        self._closed = False
        self._local = threading.local()
        self.serde = Serde.of(options)
        medium.open()
        self._objects = Objects(medium, self.index, options.ttl, self.serde)
        self._survey = Survey(medium, self.index, self._objects, self._surveyed, self._closing)
        names = [f"tier-{i}" for i in range(options.threads)]
        self._threads = [threading.Thread(target=self._serve, name=each, daemon=True) for each in names]
        for thread in self._threads:
            thread.start()
        if medium.lasting:
            self._survey.start()

    # -- submitting -------------------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        _require(keys)
        if off := self._off(Kind.LOOKUP):
            return self._submit(Kind.LOOKUP, [off] * len(keys), {}, timeout)
        verdicts = self._find(keys)
        works: dict[int, Work] = {}
        todo = [i for i, verdict in enumerate(verdicts) if verdict is None]
        for start in range(0, len(todo), self.medium.batch):
            some = todo[start : start + self.medium.batch]
            works.update(dict.fromkeys(some, Work(partial(self._objects.ask, [keys[i] for i in some]))))
        return self._submit(Kind.LOOKUP, verdicts, works, timeout)

    def submit_store(self, keys: Sequence[bytes], buffers: Sequence[Parts], timeout: float | None = None) -> int:
        _require(keys, buffers)
        if off := self._off(Kind.STORE):
            return self._submit(Kind.STORE, [off] * len(keys), {}, timeout)
        there = self.index.find(keys, time.time(), touch=True)
        verdicts: list[Outcome | None] = [verdict if verdict is Outcome.OK else None for verdict in there]
        works = {i: Work(partial(self._store, key, buffers[i])) for i, key in enumerate(keys)}
        return self._submit(Kind.STORE, verdicts, works, timeout)

    def submit_load(self, keys: Sequence[bytes], buffers: Sequence[Parts], timeout: float | None = None) -> int:
        _require(keys, buffers, written=True)
        if off := self._off(Kind.LOAD):
            return self._submit(Kind.LOAD, [off] * len(keys), {}, timeout)
        found = self._find(keys)
        verdicts: list[Outcome | None] = [verdict if verdict is Outcome.MISS else None for verdict in found]
        works = {i: Work(partial(self._load, key, buffers[i])) for i, key in enumerate(keys)}
        return self._submit(Kind.LOAD, verdicts, works, timeout)

    def delete(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        _require(keys)
        off = self._off(Kind.DELETE)
        verdicts: list[Outcome | None] = []
        works: dict[int, Work] = {}
        for i, key in enumerate(keys):
            mine = self.index.leave(key)
            if mine and off:
                self.index.stay(key)
            needed = self._asks if mine is None else mine
            verdicts.append(off if needed else Outcome.OK)
            later = partial(self.index.stay, key) if mine else None
            works[i] = Work(partial(self._delete, key, bool(mine)), later)
        return self._submit(Kind.DELETE, verdicts, works, timeout)

    def _submit(
        self, kind: Kind, verdicts: list[Outcome | None], works: Mapping[int, Work], timeout: float | None
    ) -> int:
        """Open a job and queue the keys without a verdict, as many as there is room for; neighbours may share one."""
        options = self.options
        bound = options.store_queue if kind is Kind.STORE else options.load_queue
        if timeout is None:
            timeout = float(getattr(options, f"{kind.value}_timeout"))
        with self._more:
            todo = [i for i, verdict in enumerate(verdicts) if verdict is None]
            taken = [] if self._closing.is_set() else todo[: max(0, bound - self._pending[kind])]
            for i in todo[len(taken) :]:
                verdicts[i] = Outcome.CLOSED if self._closing.is_set() else Outcome.REFUSED
                if drop := works[i].drop:
                    drop()
            job = self._jobs.open(kind, verdicts, timeout)
            self._pending[kind] += len(taken)
            tasks = [Task(job, tuple(some), works[some[0]]) for some in _together(taken, works)]
            if kind is Kind.STORE:
                self._stores.extend(tasks)
            else:
                self._urgent.extend(tasks)
            self._more.notify(len(tasks))
        return job.number

    @property
    def scanned(self) -> bool:
        """Whether everything is known that was there at the start."""
        return self._survey.complete or not (self.medium.lasting and self.index.keeps)

    @property
    def _asks(self) -> bool:
        """Whether the medium may hold what the index does not know."""
        return self.medium.shared or not self.scanned

    def _find(self, keys: Sequence[bytes]) -> list[Outcome | None]:
        asks = self._asks  # before the index: what a scan completed meanwhile is in it
        verdicts = self.index.find(keys, time.time())
        return verdicts if asks else [Outcome.MISS if verdict is None else verdict for verdict in verdicts]

    def _off(self, kind: Kind) -> Outcome | None:
        self._probe()
        if self._closing.is_set():
            return Outcome.CLOSED
        return None if self._breaker(kind).closed else Outcome.OFF

    def _breaker(self, kind: Kind) -> Breaker:
        return self._writes if kind in _WRITING else self._reads

    # -- results ----------------------------------------------------------------------------------------------------

    def poll(self) -> list[JobResult]:
        self._probe()
        self._expire()
        return self._jobs.take()

    def freed(self) -> list[tuple[int, int]]:
        return self._jobs.freed()

    def wait(self, timeout: float) -> bool:
        until = time.monotonic() + timeout
        while True:
            self._expire()
            left = until - time.monotonic()
            if self._jobs.wait(timeout=left) or left <= 0:
                return self._jobs.wait(timeout=0)

    def holds(self, key: bytes) -> bool:
        return not self.medium.shared and self.index.is_ready(key)

    def left(self) -> tuple[list[bytes], bool]:
        return self.index.take_left()

    def counts(self) -> Counts:
        counts = self._jobs.counts()
        counts.evicted = self.index.evicted
        counts.used = self.index.used
        counts.objects = len(self.index)
        counts.trips = self._reads.trips + self._writes.trips
        return counts

    def _expire(self) -> None:
        for job in self._jobs.expire():
            if self.scanned or job.kind is not Kind.STORE:
                self._breaker(job.kind).fault(time.monotonic(), f"a {job.kind.value} missed its deadline")

    def check(self, fix: bool = False) -> list[str]:
        faults = self.index.check()
        try:
            return faults + self._survey.reconcile(fix, sweep=fix)
        except Exception as error:
            return [*faults, f"{self._name} can't be listed: {error}"]

    def close(self, timeout: float) -> bool:
        until = time.monotonic() + timeout
        with self._more:
            self._closing.set()
            self._urgent.clear()
            self._stores.clear()
            self._more.notify_all()
        self._jobs.end_all(Outcome.CLOSED)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        ended = self._survey.join(max(0.0, until - time.monotonic()))
        ended = ended and not any(thread.is_alive() for thread in self._threads)
        if ended and not self._closed:
            self._closed = True
            self.medium.close()
        return ended

    # -- threads ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (task := self._next()) is not None:
            if isinstance(task, Task):
                self._run(task)
            else:
                task()

    def _next(self) -> Task | Callable[[], None] | None:
        with self._more:
            while not self._closing.is_set():
                if self._urgent:
                    return self._urgent.popleft()
                if self._stores and self.scanned and self._storing < max(1, self.options.threads - 1):
                    self._storing += 1
                    return self._stores.popleft()
                self._more.wait(timeout=_IDLE)
        return None

    def _run(self, task: Task) -> None:
        kind = task.job.kind
        why = "an object was damaged"
        started = self._jobs.start(task.job, task.keys)
        done: list[Done] = []
        if started:
            try:
                done = task.work.call()
            except Exception as error:
                done, why = [(Outcome.FAILED, 0)] * len(task.keys), f"{type(error).__name__}: {error}"
                logger.debug("a %s on %s failed: %s", kind.value, self._name, why)
        elif task.work.drop:
            task.work.drop()
        with self._more:
            self._pending[kind] -= len(task.keys)
            if kind is Kind.STORE:
                self._storing -= 1
                self._more.notify()
        if any(outcome in _FAULTS for outcome, _ in done):
            self._breaker(kind).fault(time.monotonic(), why)
        elif any(nbytes for _, nbytes in done) and not task.job.ended:
            self._breaker(kind).success()
        for i, (outcome, nbytes) in zip(task.keys, done, strict=False):  # more than the queue had room for may be done
            self._jobs.finish(task.job, i, outcome, nbytes)

    def _store(self, key: bytes, parts: Parts) -> list[Done]:
        return [self._objects.store(key, parts, self._header())]

    def _load(self, key: bytes, parts: Parts) -> list[Done]:
        return [self._objects.load(key, parts, self._header(), self._asks)]

    def _delete(self, key: bytes, known: bool) -> list[Done]:
        return [self._objects.delete(key, known)]

    def _header(self) -> memoryview:
        """This thread's block for headers, on a memory page of its own."""
        if not hasattr(self._local, "header"):
            self._local.header = memoryview(mmap.mmap(-1, BLOCK))
        header: memoryview = self._local.header
        return header

    def _probe(self) -> None:
        for breaker, write in ((self._reads, False), (self._writes, True)):
            if not breaker.closed and breaker.claim_probe(time.monotonic()):
                with self._more:
                    self._urgent.appendleft(partial(self._try, breaker, write))
                    self._more.notify()

    def _try(self, breaker: Breaker, write: bool) -> None:
        try:
            self.medium.probe(write)
        except Exception as error:
            logger.debug("%s: the probe failed: %s", self._name, error)
            breaker.probed(False, time.monotonic())
        else:
            breaker.probed(True, time.monotonic())
            self._survey.start()  # what was there may have changed

    def _surveyed(self, fault: Exception | None) -> None:
        if fault is not None:
            self._writes.fault(time.monotonic(), f"listing what is there: {fault}", at_once=not self.scanned)
        with self._more:
            self._more.notify_all()


def _together(taken: Iterable[int], works: Mapping[int, Work]) -> Iterator[list[int]]:
    """`taken` in groups of neighbours that share a work."""
    return (list(some) for _, some in itertools.groupby(taken, key=lambda i: id(works[i])))


def _require(keys: Sequence[bytes], buffers: Sequence[Parts] | None = None, written: bool = False) -> None:
    if any(len(key) != KEY_BYTES for key in keys):
        raise ValueError(f"a key has {KEY_BYTES} bytes")
    if buffers is None:
        return
    if len(buffers) != len(keys):
        raise ValueError(f"{len(keys)} keys with {len(buffers)} buffers")
    for parts in buffers:
        if len(parts) > MAX_PARTS or not all(part.contiguous and not (written and part.readonly) for part in parts):
            raise ValueError(f"a buffer is at most {MAX_PARTS} contiguous parts, writable in a load")
