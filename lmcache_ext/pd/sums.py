"""Sums of slots. Memory of a GPU has a function of its own (`gpu_sums.py`): both sides need the same."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from lmcache_ext.pd.handover import Handover
from lmcache_ext.pd.options import Sums
from lmcache_ext.pd.parts import Runs
from lmcache_ext.pd.ports import Waker
from lmcache_ext.transfer.pool import HostPool

_WORTH = 1024 * 1024  # bytes of sums that are worth waking their taker
_TOGETHER = 64  # chunks: a GPU takes about as long for one


def of_pool(pool: HostPool) -> Sums:
    """Of a host pool's slots: xxh3-128, seed 0, one after the other as they are asked for. One run is summed without
    the GIL."""
    size = pool.shape.slot_bytes
    view = memoryview(pool.bytes.data)

    def bytes_of(slot: int, offset: int, nbytes: int) -> memoryview:
        return view[slot * size + offset : slot * size + offset + nbytes]

    def one(slot: int, runs: Runs) -> bytes:
        if len(runs) == 1:
            return xxhash.xxh3_128_digest(bytes_of(slot, *runs[0]))
        total = xxhash.xxh3_128()
        for run in runs:
            total.update(bytes_of(slot, *run))
        return total.digest()

    return lambda asked: (one(slot, runs) for slot, runs in asked)


_Asked = tuple[Handover, int, int, Runs]
"""A request, a chunk's number in it, its slot, what of it."""


@dataclass(frozen=True)
class Summed:
    """A chunk's sum, or why there is none."""

    handover: Handover
    index: int
    total: bytes
    error: str = ""


class Summer:
    """A thread that takes sums, in the order in which they are asked for. `done` belongs to whoever is woken."""

    def __init__(self, take: Sums, waker: Waker, enter: Callable[[], None]) -> None:
        self.done: deque[Summed] = deque()
        self._take = take
        self._waker = waker
        self._enter = enter
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lmcache-pd-sum", daemon=True)
        self._thread.start()

    def ask(self, handover: Handover, index: int, slot: int, runs: Runs) -> None:
        """The sum of these bytes of a slot, which stay as they are until it is done."""
        self._asked.put((handover, index, slot, runs))

    def _run(self) -> None:
        self._enter()
        while (asked := self._asked.get()) is not None:  # no deadline: `close` ends it
            batch = [asked]
            while len(batch) < _TOGETHER and not self._asked.empty():
                if (asked := self._asked.get_nowait()) is None:
                    self._asked.put(None)
                    break
                batch.append(asked)
            self._sum(batch)

    def _sum(self, batch: list[_Asked]) -> None:
        done, fresh = 0, 0
        try:
            for total in self._take([(slot, runs) for _, _, slot, runs in batch]):
                handover, index, _, runs = batch[done]
                self.done.append(Summed(handover, index, total))
                done += 1
                fresh += sum(nbytes for _, nbytes in runs)
                if fresh >= _WORTH:
                    fresh = 0
                    self._waker.wake()
        except Exception as error:
            self.done.extend(Summed(handover, i, b"", f"no sum of a slot: {error}") for handover, i, *_ in batch[done:])
        self._waker.wake()

    def close(self, timeout: float) -> None:
        """End, once all that was asked for is done."""
        self._asked.put(None)
        self._thread.join(timeout)
