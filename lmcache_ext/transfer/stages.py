"""How a plan goes through the ring, stage by stage, in compiled code that holds no GIL.

A stage is as many rows as a ring slot holds. Its DMA and its kernel run on two streams, so that the kernel of one stage
runs beside the DMA of the next:

    load:   copy stream    wait free[turn] · DMA to slot ─ record middle[turn]
            kernel stream                                  wait middle[turn] · scatter ─ record free[turn], end[n]
    store:  kernel stream  wait free[turn] · gather ────── record middle[turn]
            copy stream                                    wait middle[turn] · DMA out ─ record free[turn], end[n]

The loop stays at most `ahead` stages in front of the GPU. A thread that took the GIL for each of these calls would wait
for the engine's main thread up to 5 ms a call whenever that computes in Python, and the link would idle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcache_ext.transfer.base import Blocks
from lmcache_ext.transfer.driver import Call, Driver

Ints = npt.NDArray[np.int64]
Issue = Callable[..., int]
CALLS = ("", "cuStreamWaitEvent", "cuMemcpyAsync", "cuEventRecord", "cuLaunchKernel", "cuEventSynchronize")
_SITE = 100000  # of an error code: status + _SITE * index in CALLS


@dataclass(frozen=True)
class Stages:
    """A plan, cut up. `stages` [n, 3]: first run, end of runs, rows. `runs` [m, 3]: offset in the ring slot, host
    address, bytes. `first` [n]: the stage's first row in the plan."""

    stages: Ints
    runs: Ints
    first: Ints


def cut(rows: Blocks, stage_rows: int, piece_rows: int, row_bytes: int, host: int) -> Stages:
    """Stages of `stage_rows` rows, and in each the stretches of consecutive rows of the pool: one DMA each. A stretch
    stays within one pinned piece of `piece_rows` rows, because a DMA may not span two."""
    index = np.arange(len(rows))
    breaks = np.ones(len(rows), dtype=bool)
    breaks[1:] = (np.diff(rows) != 1) | (rows[1:] % piece_rows == 0)
    breaks |= index % stage_rows == 0
    starts = np.flatnonzero(breaks)
    lengths = np.diff(np.append(starts, len(rows)))
    runs = np.stack([starts % stage_rows * row_bytes, host + rows[starts] * row_bytes, lengths * row_bytes], axis=1)
    first = np.arange(0, len(rows), stage_rows)
    edges = np.searchsorted(starts, np.append(first, len(rows)))
    count = np.diff(np.append(first, len(rows)))
    stages = np.stack([edges[:-1], edges[1:], count], axis=1)
    return Stages(stages.astype(np.int64), np.ascontiguousarray(runs, dtype=np.int64), first.astype(np.int64))


class Track:
    """What one lane's loop works with, as arrays: compiled code reads nothing else.

    Args:
        copy, kernel: streams.
        rings: [r] addresses of the ring's slots.
        events: makes an event.
        ahead: stages issued and not finished.
        function, programs, threads, shared: how to launch the kernel.
        arguments: the kernel's, 8 bytes each; `vary` are the places of blocks, ring and rows in it.
    """

    def __init__(
        self, copy: int, kernel: int, rings: list[int], event: Callable[[], int], ahead: int,
        function: int, programs: int, threads: int, shared: int, arguments: list[int], vary: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self.middle = np.array([event() for _ in rings], dtype=np.int64)
        self.free = np.array([event() for _ in rings], dtype=np.int64)
        self.end = np.array([event() for _ in range(ahead)], dtype=np.int64)
        self.rings = np.array(rings, dtype=np.int64)
        self.arguments = np.array(arguments, dtype=np.int64)
        self.pointers = self.arguments.ctypes.data + 8 * np.arange(len(arguments), dtype=np.int64)
        self.fixed = np.array(
            [copy, kernel, function, programs, threads, shared, self.pointers.ctypes.data, *vary], dtype=np.int64
        )
        self.issued = np.zeros(1, dtype=np.int64)  # stages, ever


def loop(driver: Any) -> Issue:  # long: it compiles as a whole, and a function for each step would hide the order
    """The loop, in Python; `compiled` is what runs. `driver` has the calls."""
    wait_event: Call = driver.wait_event
    record: Call = driver.record
    await_event: Call = driver.await_event
    copy_in: Call = driver.copy_in
    copy_out: Call = driver.copy_out
    launch: Call = driver.launch

    def issue(  # long: as above
        load: bool, after: int, began: int, ended: int, blocks: int, stages: Ints, runs: Ints, first_row: Ints,
        fixed: Ints, rings: Ints, middle: Ints, free: Ints, end: Ints, arguments: Ints, issued: Ints,
    ) -> int:  # fmt: skip
        copy, kernel = fixed[0], fixed[1]
        first = copy if load else kernel
        last = kernel if load else copy
        status = wait_event(first, after, 0)
        if status:
            return status + _SITE
        status = record(began, first)
        if status:
            return status + 3 * _SITE
        for stage in range(stages.shape[0]):
            turn = issued[0] % rings.shape[0]
            over = end[issued[0] % end.shape[0]]
            issued[0] += 1
            status = await_event(over)  # of the stage that is `ahead` before this one
            if status:
                return status + 5 * _SITE
            status = wait_event(first, free[turn], 0)
            if status:
                return status + _SITE
            arguments[fixed[7]] = blocks + 8 * first_row[stage]
            arguments[fixed[8]] = rings[turn]
            arguments[fixed[9]] = stages[stage, 2]
            for half in range(2):
                if (half == 0) == load:
                    for run in range(stages[stage, 0], stages[stage, 1]):
                        if load:
                            status = copy_in(rings[turn] + runs[run, 0], runs[run, 1], runs[run, 2], copy)
                        else:
                            status = copy_out(runs[run, 1], rings[turn] + runs[run, 0], runs[run, 2], copy)
                        if status:
                            return status + 2 * _SITE
                else:
                    status = launch(fixed[2], fixed[3], 1, 1, fixed[4], 1, 1, fixed[5], kernel, fixed[6], 0)
                    if status:
                        return status + 4 * _SITE
                if half == 0:
                    status = record(middle[turn], first)
                    if status:
                        return status + 3 * _SITE
                    status = wait_event(last, middle[turn], 0)
                    if status:
                        return status + _SITE
            status = record(free[turn], last)
            if status:
                return status + 3 * _SITE
            status = record(over, last)
            if status:
                return status + 3 * _SITE
        status = record(ended, last)
        return status + 3 * _SITE if status else 0

    return issue


def compiled(driver: Driver) -> Issue:
    """The loop as native code without the GIL. Compiles for seconds; call it while nobody waits."""
    from numba import boolean, int64, njit

    array, matrix = int64[::1], int64[:, ::1]
    signature = int64(
        boolean, int64, int64, int64, int64, matrix, matrix, array, array, array, array, array, array, array, array
    )
    return njit(signature, nogil=True)(loop(driver))  # type: ignore[no-any-return]


def explain(code: int) -> tuple[str, int]:
    """(the call that failed, its status) of what the loop returned."""
    return CALLS[code // _SITE], code % _SITE
