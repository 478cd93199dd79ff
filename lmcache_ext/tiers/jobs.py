"""Every job from its submission to its one result."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

from lmcache_ext.tiers.base import Counts, JobResult, Kind, Outcome

_BUFFERED = (Kind.STORE, Kind.LOAD)


class Job:
    """One job. Owned by `Jobs`, whose lock guards it."""

    __slots__ = ("began", "deadline", "ended", "kind", "left", "nbytes", "number", "outcomes", "running")

    def __init__(self, number: int, kind: Kind, outcomes: list[Outcome | None], began: float, timeout: float) -> None:
        self.number = number
        self.kind = kind
        self.outcomes = outcomes  # None: not known yet
        self.left = outcomes.count(None)
        self.running: set[int] = set()  # indices of keys that a thread works on
        self.nbytes = 0
        self.began = began
        self.deadline = began + timeout
        self.ended = False


class Jobs:
    """Thread-safe; nothing blocks but `wait`. A job ends when its last key does, or by `expire` or `end_all`."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._numbers = itertools.count(1)
        self._open: dict[int, Job] = {}  # guarded by _change, as all below
        self._deadlines: list[tuple[float, int]] = []  # heap; may name jobs that have ended
        self._results: deque[JobResult] = deque()
        self._freed: list[tuple[int, int]] = []
        self._held = 0
        self._counts = Counts()

    def open(self, kind: Kind, outcomes: Sequence[Outcome | None], timeout: float) -> Job:
        """A new job. Outcomes that are known already are given; with all of them, it ends at once."""
        with self._change:
            job = Job(next(self._numbers), kind, list(outcomes), time.monotonic(), timeout)
            if job.left:
                self._open[job.number] = job
                heapq.heappush(self._deadlines, (job.deadline, job.number))
            else:
                self._end(job)
            return job

    def start(self, job: Job, keys: Iterable[int]) -> bool:
        """A thread wants to work on these keys. False if the job has ended: its buffers must not be touched."""
        with self._change:
            if job.ended or time.monotonic() >= job.deadline:
                return False
            job.running.update(keys)
            return True

    def finish(self, job: Job, i: int, outcome: Outcome, nbytes: int = 0) -> bool:
        """The thread is done with key `i`. Returns whether it was in time."""
        with self._change:
            job.running.discard(i)
            if job.ended:
                if job.kind in _BUFFERED:
                    self._held -= 1
                    self._freed.append((job.number, i))
                return False
            job.outcomes[i] = outcome
            job.left -= 1
            if outcome is Outcome.OK:
                job.nbytes += nbytes
            if not job.left:
                self._end(job)
            return True

    def expire(self) -> list[Job]:
        """End the jobs whose deadline has passed; returns them."""
        if not self._deadlines or self._deadlines[0][0] > time.monotonic():
            return []
        late = []
        with self._change:
            now = time.monotonic()
            while self._deadlines and self._deadlines[0][0] <= now:
                job = self._open.get(heapq.heappop(self._deadlines)[1])
                if job is not None:
                    self._end(job, Outcome.LATE)
                    late.append(job)
        return late

    def end_all(self, outcome: Outcome) -> None:
        """End every job now."""
        with self._change:
            for job in list(self._open.values()):
                self._end(job, outcome)

    def _end(self, job: Job, rest: Outcome = Outcome.LATE) -> None:
        job.ended = True
        self._open.pop(job.number, None)
        held = tuple(sorted(job.running)) if job.kind in _BUFFERED else ()
        self._held += len(held)
        outcomes = tuple(rest if outcome is None else outcome for outcome in job.outcomes)
        seconds = time.monotonic() - job.began
        self._results.append(JobResult(job.number, job.kind, outcomes, held, job.nbytes, seconds))
        for outcome in outcomes:
            self._counts.keys[job.kind, outcome] = self._counts.keys.get((job.kind, outcome), 0) + 1
        if job.kind is Kind.STORE:
            self._counts.stored_bytes += job.nbytes
        elif job.kind is Kind.LOAD:
            self._counts.loaded_bytes += job.nbytes
        self._change.notify_all()

    def take(self) -> list[JobResult]:
        """Results since the last call."""
        if not self._results:
            return []
        with self._change:
            taken = list(self._results)
            self._results.clear()
            return taken

    def freed(self) -> list[tuple[int, int]]:
        """Held buffers that came back since the last call."""
        with self._change:
            back, self._freed = self._freed, []
            return back

    def wait(self, timeout: float) -> bool:
        """Until there is a result, `timeout` seconds have passed, or a deadline has; whether there is a result."""
        with self._change:
            if not self._results:
                if self._deadlines:
                    timeout = min(timeout, self._deadlines[0][0] - time.monotonic())
                self._change.wait(timeout=max(0.0, timeout))
            return bool(self._results)

    def counts(self) -> Counts:
        """A copy, without what the index and the breakers know."""
        with self._change:
            c = self._counts
            return Counts(dict(c.keys), c.stored_bytes, c.loaded_bytes, held=self._held)
