"""How a plan goes through the ring, stage by stage, in compiled code that holds no GIL.

A stage is as many rows as a ring slot holds. Its DMA and its kernel run on two streams, so that the kernel of one stage
runs beside the DMA of the next. Stages take the ring's slots in turn; a slot's stage is over at `over[turn]`, and until
then the loop does not use it again, so it stays a ring ahead of the GPU and no more:

    load:   copy stream    wait middle[turn - 1] · DMA to slot ─ record middle[turn]
            kernel stream                                        wait middle[turn] · scatter ─ record over[turn]
    store:  kernel stream  gather ─ record middle[turn]
            copy stream                     wait middle[turn], over[turn - 1] · DMA out ─ record over[turn]

Two things here are measured, not obvious (docs/transfer.md). DMAs alternate between two copy streams and wait for each
other: a copy engine stays with a channel as long as that has work, so behind a queue on one stream the small copies of
the engine's steps waited until all of it was done. And kernels are launched as graphs of one node: after a plain
launch on another stream than the engine's, the engine's own graphs ran 3 % slower.

A thread that took the GIL for each of these calls would wait for the engine's main thread up to 5 ms a call whenever
that computes in Python, and the link would idle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmcache_ext import native
from lmcache_ext.native import call
from lmcache_ext.transfer.base import Blocks

Ints = npt.NDArray[np.int64]
Issue = Callable[..., int]
CALLS = (
    "cuStreamWaitEvent", "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2", "cuEventRecord",
    "cuGraphExecKernelNodeSetParams_v2", "cuGraphLaunch", "cuEventSynchronize",
)  # fmt: skip
"""What the loop calls, in the order in which it is given their addresses."""
CALLS_ON_GPU = tuple("cuMemcpyDtoDAsync_v2" if name.startswith("cuMemcpy") else name for name in CALLS)
"""The same where the pool, too, is the GPU's memory."""
WAIT_EVENT, COPY_IN, COPY_OUT, RECORD, SET_KERNEL, LAUNCH, AWAIT_EVENT = range(7)
_SITE = 100000  # of an error code: status + _SITE * (index in CALLS + 1)


@dataclass(frozen=True)
class Stages:
    """A plan, cut up. `stages` [n, 3]: first run, end of runs, rows. `runs` [m, 3]: offset in the ring slot, host
    address, bytes. `first` [n]: the stage's first row in the plan."""

    stages: Ints
    runs: Ints
    first: Ints


def cut(at: Blocks, stage_rows: int, piece_bytes: int, row_bytes: int, host: int) -> Stages:
    """Stages of `stage_rows` rows, and in each the stretches of rows that lie one behind the other in the pool: one DMA
    each. A stretch stays within one pinned piece of `piece_bytes` bytes, because a DMA may not span two. `at`: where
    each row begins, in bytes."""
    index = np.arange(len(at))
    breaks = np.ones(len(at), dtype=bool)
    breaks[1:] = (np.diff(at) != row_bytes) | np.diff(at // piece_bytes).astype(bool)
    breaks |= index % stage_rows == 0
    starts = np.flatnonzero(breaks)
    lengths = np.diff(np.append(starts, len(at)))
    runs = np.stack([starts % stage_rows * row_bytes, host + at[starts], lengths * row_bytes], axis=1)
    first = np.arange(0, len(at), stage_rows)
    edges = np.searchsorted(starts, np.append(first, len(at)))
    count = np.diff(np.append(first, len(at)))
    stages = np.stack([edges[:-1], edges[1:], count], axis=1)
    return Stages(stages.astype(np.int64), np.ascontiguousarray(runs, dtype=np.int64), first.astype(np.int64))


class Track:
    """What one lane's loop works with, as arrays: compiled code reads nothing else.

    Args:
        copies, kernel: streams, two of the former.
        rings: [r] addresses of the ring's slots.
        event: makes an event.
        graphs: [r, 2] a graph of one kernel node that can be launched, and its node, for each slot.
        parameters: address of that node's parameters, whose arguments are `arguments`.
        arguments: the kernel's, 8 bytes each; `vary` are the places of blocks, ring and rows in it.
    """

    def __init__(
        self, copies: tuple[int, int], kernel: int, rings: list[int], event: Callable[[], int],
        graphs: list[tuple[int, int]], parameters: int, arguments: Ints, vary: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self.middle = np.array([event() for _ in rings], dtype=np.int64)
        self.over = np.array([event() for _ in rings], dtype=np.int64)
        self.rings = np.array(rings, dtype=np.int64)
        self.graphs = np.array(graphs, dtype=np.int64)
        self.arguments = arguments
        self.fixed = np.array([*copies, kernel, parameters, *vary], dtype=np.int64)
        self.issued = np.zeros(1, dtype=np.int64)  # stages, ever


def issue(  # long: it compiles as a whole, and a function for each step would hide the order
    load: bool, after: int, began: int, ended: int, blocks: int, stages: Ints, runs: Ints, first_row: Ints,
    calls: Ints, fixed: Ints, rings: Ints, middle: Ints, over: Ints, graphs: Ints, arguments: Ints, issued: Ints,
) -> int:  # fmt: skip
    """Issue a plan's stages. Returns 0, or what `explain` explains. `compiled` is what runs."""
    kernel, last = fixed[2], fixed[2]
    for stage in range(stages.shape[0]):
        turn, before = issued[0] % rings.shape[0], (issued[0] - 1) % rings.shape[0]
        copy = fixed[issued[0] % 2]
        first, last = (copy, kernel) if load else (kernel, copy)
        issued[0] += 1
        status: int = call(calls[AWAIT_EVENT], (over[turn],))
        if status:
            return status + _SITE * (AWAIT_EVENT + 1)
        if stage == 0:  # the others come behind it
            status = call(calls[WAIT_EVENT], (first, after, 0))
            if status:
                return status + _SITE * (WAIT_EVENT + 1)
            status = call(calls[RECORD], (began, first))
            if status:
                return status + _SITE * (RECORD + 1)
        for half in range(2):
            if (half == 0) == load:
                status = call(calls[WAIT_EVENT], (copy, middle[before] if load else over[before], 0))
                if status:
                    return status + _SITE * (WAIT_EVENT + 1)
                for run in range(stages[stage, 0], stages[stage, 1]):
                    at, host, nbytes = rings[turn] + runs[run, 0], runs[run, 1], runs[run, 2]
                    if load:
                        status = call(calls[COPY_IN], (at, host, nbytes, copy))
                    else:
                        status = call(calls[COPY_OUT], (host, at, nbytes, copy))
                    if status:
                        return status + _SITE * ((COPY_IN if load else COPY_OUT) + 1)
            else:
                arguments[fixed[4]] = blocks + 8 * first_row[stage]
                arguments[fixed[5]] = rings[turn]
                arguments[fixed[6]] = stages[stage, 2]
                status = call(calls[SET_KERNEL], (graphs[turn, 0], graphs[turn, 1], fixed[3]))
                if status:
                    return status + _SITE * (SET_KERNEL + 1)
                status = call(calls[LAUNCH], (graphs[turn, 0], kernel))
                if status:
                    return status + _SITE * (LAUNCH + 1)
            if half == 0:
                status = call(calls[RECORD], (middle[turn], first))
                if status:
                    return status + _SITE * (RECORD + 1)
                status = call(calls[WAIT_EVENT], (last, middle[turn], 0))
                if status:
                    return status + _SITE * (WAIT_EVENT + 1)
        status = call(calls[RECORD], (over[turn], last))
        if status:
            return status + _SITE * (RECORD + 1)
    status = call(calls[RECORD], (ended, last))
    return status + _SITE * (RECORD + 1) if status else 0


def compiled() -> Issue:
    """`issue` as native code without the GIL."""
    one, two = "int64[::1]", "int64[:, ::1]"
    arrays = ", ".join([two, two, one, one, one, one, one, one, two, one, one])
    return native.compiled(issue, f"int64(boolean, int64, int64, int64, int64, {arrays})")


def explain(code: int) -> tuple[str, int]:
    """(the call that failed, its status) of what the loop returned."""
    return CALLS[code // _SITE - 1], code % _SITE
