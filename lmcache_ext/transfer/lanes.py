"""What the data planes have in common: a lane for each way, that is one thread which issues its plans in order.

A plane says how a plan's copies are issued and how one sees that they ended. On the CPU issuing is copying; on CUDA the
copies run on behind their thread, which stays a few stages ahead of the link.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from lmcache_ext.transfer.base import Plan, Result, Transfer, Way

logger = logging.getLogger("lmcache_ext.transfer")

_IDLE_SECONDS = 1.0  # how often an idle lane looks whether it should end
_JOIN_MARGIN = 60.0  # seconds that a copy under way may take beyond the load deadline before we call it lost


@dataclass
class Job:
    """A plan on its way through a lane."""

    plan: Plan
    after: Any  # the fence that its copies come behind
    deadline: float
    issued: threading.Event = field(default_factory=threading.Event)  # whatever there is to issue of it was
    cancelled: bool = False  # it need not begin
    error: str = ""  # set before `issued`
    nbytes: int = 0
    seconds: float = 0.0
    carries: Any = None  # what the plane prepared


class Lane:
    """One thread that runs its jobs in order. Its affinity is the whole machine: the engine may pin its main thread to
    one core, and a thread inherits that."""

    def __init__(self, name: str, run: Callable[[Job], None], enter: Callable[[], None]) -> None:
        self._run = run
        self._enter = enter
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Behind all that were put before. Never blocks."""
        self._jobs.put(job)

    def close(self, timeout: float) -> None:
        """End after what was put, waiting at most `timeout` seconds."""
        self._jobs.put(None)
        self._thread.join(timeout)
        if self.alive:
            logger.error("%s is still copying after %.1f s; left to end with the process", self._thread.name, timeout)

    @property
    def alive(self) -> bool:
        """Whether the thread may still copy."""
        return self._thread.is_alive()

    def _loop(self) -> None:
        use_all_cores()
        self._enter()
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                continue
            if job is None:
                return
            self._run(job)


def use_all_cores() -> None:
    """Undo for this thread what the engine's binding of its main thread made it inherit."""
    try:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the kernel keeps what the cpuset allows
    except OSError as error:
        logger.warning("copy thread stays on %s: %s", os.sched_getaffinity(0), error)


class LaneTransfer(Transfer):
    """Everything but the copies. A plane calls `_open_lanes` once it is ready to copy."""

    def __init__(self, load_timeout: float) -> None:
        self._load_timeout = load_timeout
        self._open: dict[Way, deque[Job]] = {way: deque() for way in Way}  # submitted and not reported, in order
        self._lanes: dict[Way, Lane] = {}

    def _open_lanes(self) -> None:
        self._lanes = {way: Lane(f"lmcache-{way.value}", self._perform, self._enter) for way in Way}

    # -- what a plane says -------------------------------------------------------------------------------------------

    @abstractmethod
    def _enter(self) -> None:
        """In a lane's thread, before its first job."""

    def _prepare(self, job: Job) -> None:
        """In the main thread, before the job is put: what the lane's thread would need the GIL for."""

    @abstractmethod
    def _issue(self, job: Job) -> None:
        """In the lane's thread: issue the copies of `job.plan` behind `job.after`. On an exception nothing of it may
        still be under way."""

    @abstractmethod
    def _over(self, job: Job) -> bool:
        """Whether the copies of an issued job have ended; then its `nbytes` and `seconds` are set."""

    def _release(self, job: Job) -> None:
        """A job is over, however it ended: take back what `_prepare` gave it."""

    @abstractmethod
    def _order(self, job: Job) -> None:
        """Let the engine's next work come behind the copies of this issued job."""

    # -- the contract ------------------------------------------------------------------------------------------------

    def submit(self, plans: Iterable[Plan], after: object) -> None:
        for plan in plans:
            timeout = self._load_timeout if plan.way is Way.LOAD else float("inf")
            job = Job(plan, after, time.monotonic() + timeout)
            self._open[plan.way].append(job)
            try:
                self._prepare(job)
            except Exception as fault:
                self._fail(job, fault)
            else:
                self._lanes[plan.way].put(job)

    def join(self, ids: Collection[int]) -> None:
        for job in self._open[Way.LOAD]:
            if job.plan.id in ids:
                if not job.issued.wait(self._load_timeout + _JOIN_MARGIN):
                    raise TimeoutError(f"{job.plan.id} was not issued within {self._load_timeout + _JOIN_MARGIN} s")
                if not job.error:
                    self._order(job)

    def poll(self) -> list[Result]:
        results = []
        for way, jobs in self._open.items():
            while jobs and jobs[0].issued.is_set() and (jobs[0].error or self._over(jobs[0])):
                job = jobs.popleft()
                self._release(job)
                results.append(Result(job.plan.id, way, not job.error, job.nbytes, job.seconds, job.error))
        return results

    @property
    def idle(self) -> bool:
        return not any(self._open.values())

    def cancel(self, ids: Collection[int]) -> None:
        for jobs in self._open.values():
            for job in jobs:
                job.cancelled |= job.plan.id in ids

    def close(self, timeout: float) -> None:
        for jobs in self._open.values():
            for job in jobs:
                job.cancelled = True
        for lane in self._lanes.values():
            lane.close(timeout)

    def _perform(self, job: Job) -> None:
        if job.cancelled:
            job.error = "cancelled"
        elif time.monotonic() > job.deadline:
            job.error = f"not begun within {self._load_timeout} s"
        else:
            try:
                self._issue(job)
            except Exception as fault:
                self._fail(job, fault)
        job.issued.set()

    def _fail(self, job: Job, fault: Exception) -> None:
        logger.error("%s of plan %d failed", job.plan.way.value, job.plan.id, exc_info=fault)
        job.error = f"{type(fault).__name__}: {fault}"
        job.issued.set()
