"""Sums of slots. Memory of a GPU has a function of its own (`gpu_sums.py`): both sides need the same."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from lmcache_ext.pd.handover import Handover
from lmcache_ext.pd.options import Sum
from lmcache_ext.pd.parts import Runs
from lmcache_ext.pd.ports import Waker
from lmcache_ext.transfer.pool import HostPool

_WORTH = 1024 * 1024  # bytes of sums that are worth waking their taker


def of_pool(pool: HostPool) -> Sum:
    """Of a host pool's slots: xxh3-128, seed 0. One run is summed without the GIL."""
    size = pool.shape.slot_bytes
    view = memoryview(pool.bytes.data)

    def bytes_of(slot: int, offset: int, nbytes: int) -> memoryview:
        return view[slot * size + offset : slot * size + offset + nbytes]

    def take(slot: int, runs: Runs) -> bytes:
        if len(runs) == 1:
            return xxhash.xxh3_128_digest(bytes_of(slot, *runs[0]))
        total = xxhash.xxh3_128()
        for run in runs:
            total.update(bytes_of(slot, *run))
        return total.digest()

    return take


@dataclass(frozen=True)
class Summed:
    """A chunk's sum, or why there is none."""

    handover: Handover
    index: int
    total: bytes
    error: str = ""


class Summer:
    """A thread that takes sums, in the order in which they are asked for. `done` belongs to whoever is woken."""

    def __init__(self, take: Sum, waker: Waker, enter: Callable[[], None]) -> None:
        self.done: deque[Summed] = deque()
        self._take = take
        self._waker = waker
        self._enter = enter
        self._asked: queue.SimpleQueue[tuple[Handover, int, int, Runs] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lmcache-pd-sum", daemon=True)
        self._thread.start()

    def ask(self, handover: Handover, index: int, slot: int, runs: Runs) -> None:
        """The sum of these bytes of a slot, which stay as they are until it is done."""
        self._asked.put((handover, index, slot, runs))

    def _run(self) -> None:
        self._enter()
        fresh = 0
        while (asked := self._asked.get()) is not None:  # no deadline: `close` ends it
            handover, index, slot, runs = asked
            try:
                summed = Summed(handover, index, self._take(slot, runs))
            except Exception as error:
                summed = Summed(handover, index, b"", f"no sum of a slot: {error}")
            self.done.append(summed)
            fresh += sum(nbytes for _, nbytes in runs)
            if fresh >= _WORTH or self._asked.empty():
                fresh = 0
                self._waker.wake()

    def close(self, timeout: float) -> None:
        """End, once all that was asked for is done."""
        self._asked.put(None)
        self._thread.join(timeout)
