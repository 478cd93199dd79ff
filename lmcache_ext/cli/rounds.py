"""Measures one tier beside the bare limit of what it is made of, in turns."""

from __future__ import annotations

import mmap
import random
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from lmcache_ext.tiers import Parts, Tier

MIB = 1 << 20
LOOKED_UP = 128  # keys of one look-up
_SECONDS = 60.0  # for one job, and for one thread's work


class BenchError(Exception):
    """The tier, or the store below it, does not do what is to be measured."""


class Raw(ABC):
    """The same bytes by the shortest way: no header, no sum, no queue."""

    name: str  # for people
    threads: int

    @abstractmethod
    def store(self, i: int, view: memoryview) -> None:
        """Write number `i`. Called in several threads."""

    @abstractmethod
    def load(self, i: int, view: memoryview) -> None:
        """Read number `i`."""

    @abstractmethod
    def clear(self) -> None:
        """Remove all that was written."""

    def write(self, memory: Sequence[memoryview]) -> float:
        """Seconds to write every buffer."""
        return in_threads(self.threads, len(memory), lambda i: self.store(i, memory[i]))

    def read(self, memory: Sequence[memoryview]) -> float:
        """Seconds to read them again."""
        return in_threads(self.threads, len(memory), lambda i: self.load(i, memory[i]))


def buffers(count: int, nbytes: int) -> list[memoryview]:
    """Page-aligned memory, as slots of the host pool are, with 16-bit numbers of some size in it, as bf16 or fp16."""
    made = [memoryview(mmap.mmap(-1, nbytes)) for _ in range(count)]
    some = (np.frombuffer(random.randbytes(min(nbytes, MIB) // 2 * 2), np.uint16) & 0x83FF | 0x3C00).tobytes()
    for view in made:
        view[:] = (some * -(-nbytes // len(some)))[:nbytes]
    return made


def in_threads(threads: int, items: int, call: Callable[[int], object]) -> float:
    """Seconds for `call(0)` to `call(items - 1)`, spread over threads. Raises the first fault."""
    todo = iter(range(items))
    lock = threading.Lock()
    faults: list[Exception] = []

    def work() -> None:
        while not faults:
            with lock:
                i = next(todo, None)
            if i is None:
                return
            try:
                call(i)
            except Exception as error:
                faults.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(_SECONDS * 10)
    if faults:
        raise faults[0]
    return time.perf_counter() - began


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def finish(tier: Tier, jobs: int) -> None:
    """Wait until `jobs` jobs have ended. Raises BenchError unless all ended well."""
    while jobs:
        if not tier.wait(_SECONDS):
            raise BenchError(f"{jobs} jobs have not ended within {_SECONDS:g} s")
        for result in tier.poll():
            jobs -= 1
            for outcome, ok in zip(result.outcomes, result.ok, strict=True):
                if not ok:
                    raise BenchError(f"a {result.kind.value} ended with {outcome.value!r}")


def interval(values: Sequence[float]) -> str:
    """Median and the middle half."""
    q1, q2, q3 = statistics.quantiles(values, n=4)
    return f"{q2:.2f} [{q1:.2f}, {q3:.2f}]"


class Rounds:
    """Rounds of one chunk size. Report ratios within rounds: other users of the same disk or network then touch both
    sides alike.

    Args:
        raw: None: there is nothing to compare with.
        count: chunks in each round.
    """

    def __init__(self, tier: Tier, raw: Raw | None, nbytes: int, count: int) -> None:
        self.tier = tier
        self.raw = raw
        self.nbytes = nbytes
        self.memory = buffers(count, nbytes)
        self.chunks: list[Parts] = [[view[: nbytes // 2], view[nbytes // 2 :]] for view in self.memory]  # two ranks
        self.rates: dict[str, list[float]] = {}  # what → GB/s, by round
        self.times: dict[str, list[float]] = {}  # what → ms of one alone
        self._stored: list[bytes] = []

    def round(self, number: int) -> None:
        """Both ways, raw and tier, in turns."""
        keys = self._new_keys(len(self.memory))
        done: dict[str, Callable[[], float]] = {
            "store": lambda: timed(lambda: self._all(self.tier.submit_store, keys)),
            "load": lambda: timed(lambda: self._all(self.tier.submit_load, keys)),
        }
        raw = self.raw
        if raw is not None:
            done |= {"raw store": lambda: raw.write(self.memory), "raw load": lambda: raw.read(self.memory)}
        for way in ("store", "load"):
            pair = [name for name in (f"raw {way}", way) if name in done]
            for name in pair if number % 2 else reversed(pair):
                self.rates.setdefault(name, []).append(len(keys) * self.nbytes / done[name]() / 1e9)
        self.clear()

    def alone(self, count: int = 20) -> None:
        """One chunk at a time, and look-ups of 128 keys of which `count` are there."""
        keys, parts = self._new_keys(count), self.chunks[0]
        for key in keys:
            self._time("store", lambda key=key: self.tier.submit_store([key], [parts], _SECONDS))  # type: ignore[misc]
        for key in keys:
            self._time("load", lambda key=key: self.tier.submit_load([key], [parts], _SECONDS))  # type: ignore[misc]
        asked = [*keys, *(random.randbytes(32) for _ in range(LOOKED_UP - count))][:LOOKED_UP]
        for _ in keys:
            self._time("look-up", lambda: self.tier.lookup(asked, _SECONDS), all_ok=False)
        self.clear()

    def clear(self) -> None:
        """Remove what was stored. Raises BenchError if that fails."""
        if self.raw is not None:
            self.raw.clear()
        if self._stored:
            self.tier.poll()
            self.tier.delete(self._stored, _SECONDS)
            self._stored = []
            finish(self.tier, 1)

    def forget_rates(self) -> None:
        """What was measured so far was to warm up."""
        self.rates.clear()
        self.times.clear()

    def _new_keys(self, count: int) -> list[bytes]:
        keys = [random.randbytes(32) for _ in range(count)]
        self._stored += keys
        return keys

    def _all(self, submit: Callable[[list[bytes], list[Parts], float], int], keys: list[bytes]) -> None:
        for key, parts in zip(keys, self.chunks, strict=True):
            submit([key], [parts], _SECONDS)
        finish(self.tier, len(keys))

    def _time(self, what: str, call: Callable[[], int], all_ok: bool = True) -> None:
        def work() -> None:
            call()
            if all_ok:
                finish(self.tier, 1)
            elif not self.tier.wait(_SECONDS) or not self.tier.poll():
                raise BenchError(f"a {what} has not ended within {_SECONDS:g} s")

        self.times.setdefault(what, []).append(timed(work) * 1e3)
