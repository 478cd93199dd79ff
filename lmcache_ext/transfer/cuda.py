"""The CUDA data plane: pages are gathered into, or scattered from, a staging ring on the GPU by one kernel, and the
ring meets the pinned pool in large copies.

    store: pages ──gather──▶ ring ──DMA──▶ rows of the pool
    load:  rows of the pool ──DMA──▶ ring ──scatter──▶ pages

The kernel runs at device-memory speed, so the link is what counts, whatever the page size. The engine's main thread
prepares a plan as arrays; a lane's thread issues it, stage by stage, in compiled code (`stages.py`).
"""

from __future__ import annotations

import ctypes
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

from lmcache_ext.errors import TransferError
from lmcache_ext.transfer.base import Way
from lmcache_ext.transfer.driver import Driver, KernelNode
from lmcache_ext.transfer.growth import PoolGrowth, slots_per_piece
from lmcache_ext.transfer.kernel import BLOCK, WORD, add_words, move_pages
from lmcache_ext.transfer.lanes import Job, LaneTransfer
from lmcache_ext.transfer.pages import PageTable
from lmcache_ext.transfer.pool import Pool
from lmcache_ext.transfer.stages import CALLS, CALLS_ON_GPU, Stages, Track, compiled, cut, explain

logger = logging.getLogger("lmcache_ext.transfer")

STAGE_BYTES = 32 << 20  # what a ring slot holds: 0.6 ms of a PCIe 5 link, and the longest that another's copy waits
RINGS = 4  # slots
PROGRAMS = 132  # of the kernel
_ALIGNED = 256  # bytes: the kernel was compiled for a ring slot that begins at a multiple of 16
_SPARE_ARGUMENTS = 4  # Triton's kernels take pointers to scratch memory behind their own arguments; ours use none
_VARY = (4, 5, 6)  # where blocks, ring and rows stand among the kernel's arguments


@dataclass
class _Prepared:
    """What a job carries to the lane's thread."""

    stages: Stages
    ids: torch.Tensor  # on the GPU
    began: int
    ended: int
    keep: torch.Tensor  # pinned, what `ids` is copied from


def compile_sums(device: int) -> None:
    """Compile the kernel that sums a hand-over's slots, as long as vLLM expects that kernels are compiled."""
    table, totals = (torch.zeros(4, dtype=torch.int64, device=f"cuda:{device}") for _ in range(2))
    add_words[(1, 1)](table, totals, BLOCK)  # no words
    torch.cuda.current_stream(device).synchronize()


class CudaTransfer(LaneTransfer):
    """KV memory on the GPU, pool in host memory that is pinned as it grows, or on the same GPU.

    Raises:
        TransferError: a page is not a whole number of 8-byte words, or there is no CUDA context.
    """

    def __init__(self, pages: PageTable, pool: Pool, load_timeout: float) -> None:
        super().__init__(load_timeout)
        if any((table % WORD).any() for table in (pages.size, pages.stride, pages.base)):
            raise TransferError(f"pages of {pages.size.tolist()} bytes are not whole words of {WORD}")
        self._pages = pages
        self._pool = pool
        self._device = pages.keep[0].device
        self._row_bytes = pool.row_bytes
        self._stage_rows = max(1, STAGE_BYTES // self._row_bytes)
        self._piece = slots_per_piece(pool.grain)
        self._tables = [
            torch.from_numpy(table).to(self._device)
            for table in (pages.base, pages.stride, pages.size // WORD, pages.offset // WORD)
        ]
        torch.cuda.current_stream(self._device).synchronize()
        self._driver = Driver()
        self._issue_native = compiled()
        self._calls = np.array(self._driver.addresses(CALLS_ON_GPU if pool.on_gpu else CALLS), dtype=np.int64)
        self._keep: list[Any] = []  # streams and rings, which native code knows by number
        self._streams = {way: torch.cuda.Stream(self._device) for way in Way}  # the kernels'
        self._tracks = {way: self._lay(way) for way in Way}
        self._events: list[int] = []  # timed, not in use
        self._growth: PoolGrowth | None = None
        if pool.on_gpu:
            pool.grown = pool.grain.slots
        else:
            self._growth = PoolGrowth(pool, self._driver.pin, self._driver.enter, self._piece)
        self._open_lanes()

    def _lay(self, way: Way) -> Track:
        """Streams, ring and kernel of one way. Compiles the kernel: no row is moved."""
        copies, kernel = [torch.cuda.Stream(self._device) for _ in range(2)], self._streams[way]
        size = -(-self._stage_rows * self._row_bytes // _ALIGNED) * _ALIGNED
        ring = torch.empty(RINGS * size, dtype=torch.uint8, device=self._device)
        none = torch.zeros(1, dtype=torch.int64, device=self._device)
        chunks = triton.cdiv(int(self._pages.size.max()) // WORD, BLOCK)
        numbers = (0, len(self._pages.size), self._row_bytes // WORD, chunks)
        made = move_pages[(PROGRAMS,)](  # on the engine's own stream: see stages.py
            *self._tables, none, ring.view(torch.int64), *numbers, TO_PAGES=way is Way.LOAD, BLOCK=BLOCK
        )
        torch.cuda.current_stream(self._device).synchronize()
        arguments = np.array([*(t.data_ptr() for t in self._tables), 0, 0, *numbers, *[0] * _SPARE_ARGUMENTS])
        pointers = arguments.ctypes.data + 8 * np.arange(len(arguments))
        node = KernelNode(
            function=made.function, grid=(PROGRAMS, 1, 1), block=(32 * made.metadata.num_warps, 1, 1),
            shared=made.metadata.shared, arguments=pointers.ctypes.data,
        )  # fmt: skip
        self._keep += [copies, ring, made, pointers, node]
        return Track(
            copies=(copies[0].cuda_stream, copies[1].cuda_stream),
            kernel=kernel.cuda_stream,
            rings=[ring.data_ptr() + i * size for i in range(RINGS)],
            event=self._driver.new_event,
            graphs=[self._driver.new_graph(node) for _ in range(RINGS)],
            parameters=ctypes.addressof(node),
            arguments=arguments,
            vary=_VARY,
        )

    # -- the main thread ---------------------------------------------------------------------------------------------

    def fence(self) -> object:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def beat(self) -> None:
        if self._growth:
            self._growth.beat()

    @property
    def stopped(self) -> bool:
        return self._growth is None or self._growth.stopped

    def _prepare(self, job: Job) -> None:
        plan = job.plan
        piece_bytes = self._piece * self._pool.grain.slot_bytes
        stages = cut(self._pool.at(plan.rows), self._stage_rows, piece_bytes, self._row_bytes, self._pool.address)
        blocks = torch.from_numpy(plan.blocks).pin_memory()
        with torch.cuda.stream(self._streams[plan.way]):
            ids = blocks.to(self._device, non_blocking=True)
        job.carries = _Prepared(stages, ids, self._event(), self._event(), blocks)

    def _event(self) -> int:
        return self._events.pop() if self._events else self._driver.new_event(timed=True)

    def _over(self, job: Job) -> bool:
        done: _Prepared = job.carries
        if not self._driver.reached(done.ended):
            return False
        job.nbytes = len(job.plan.blocks) * self._row_bytes
        job.seconds = self._driver.seconds(done.began, done.ended)
        return True

    def _release(self, job: Job) -> None:
        if job.carries is not None:
            self._events += [job.carries.began, job.carries.ended]

    def _order(self, job: Job) -> None:
        self._driver.order(torch.cuda.current_stream(self._device).cuda_stream, job.carries.ended)

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        pinned = self._growth.close(timeout) if self._growth else []
        super().close(max(0.0, deadline - time.monotonic()))
        while any(self._open.values()) and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.001)
        if any(self._open.values()):
            logger.error("copies are still under way after %.1f s; the pool stays pinned", timeout)
            return
        for address in pinned:
            self._driver.unpin(address)

    # -- a lane's thread ---------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        self._driver.enter()

    def _issue(self, job: Job) -> None:
        track, given, parts = self._tracks[job.plan.way], job.carries, job.carries.stages
        code = self._issue_native(
            job.plan.way is Way.LOAD, job.after.cuda_event, given.began, given.ended, given.ids.data_ptr(),
            parts.stages, parts.runs, parts.first, self._calls, track.fixed, track.rings, track.middle, track.over,
            track.graphs, track.arguments, track.issued,
        )  # fmt: skip
        if code:
            for stream in track.fixed[:3].tolist():  # what was issued must be over before its blocks are given back
                self._driver.finish(stream)
            raise self._driver.error(*explain(code))
