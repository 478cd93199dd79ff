"""The CUDA data plane: pages are gathered into, or scattered from, a staging ring on the GPU by one kernel, and the
ring meets the pinned pool in large copies.

    store: pages ──gather──▶ ring ──DMA──▶ rows of the pool
    load:  rows of the pool ──DMA──▶ ring ──scatter──▶ pages

The kernel runs at device-memory speed, so the link is what counts, whatever the page size. Each way has a lane: a thread
that issues stages, two streams on which the kernel of one stage runs beside the DMA of the next, and a ring. The thread
stays a few stages ahead of the link and no more, so that its calls are spread evenly over the time that the copies take
and the engine's own thread is never held up for long.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton

from lmcache_ext.errors import TransferError
from lmcache_ext.transfer.base import Blocks, Way
from lmcache_ext.transfer.driver import Driver
from lmcache_ext.transfer.growth import PoolGrowth, slots_per_piece
from lmcache_ext.transfer.kernel import BLOCK, WORD, move_pages
from lmcache_ext.transfer.lanes import Job, LaneTransfer
from lmcache_ext.transfer.pages import PageTable
from lmcache_ext.transfer.pool import HostPool

logger = logging.getLogger("lmcache_ext.transfer")

STAGE_BYTES = 64 << 20
RINGS = 2
AHEAD = 8  # stages issued and not finished: 10 ms of a PCIe 5 link
PROGRAMS = 64  # of the kernel: enough to outrun the link, few enough to leave the GPU to the engine


@dataclass
class _Track:
    """What one lane's thread works with: a stream for the DMA, one for the kernel, a ring between them."""

    copy: torch.cuda.Stream
    kernel: torch.cuda.Stream
    rings: list[torch.Tensor]
    free: list[torch.cuda.Event | None]  # by ring: when its last stage was done with it
    ends: deque[torch.cuda.Event] = field(default_factory=deque)  # of the stages under way
    turn: int = 0


@dataclass
class _Marks:
    began: torch.cuda.Event
    ended: torch.cuda.Event
    keep: list[Any]  # what the copies still read


class CudaTransfer(LaneTransfer):
    """KV memory on the GPU, pool in host memory that is pinned as it grows.

    Raises:
        TransferError: a page is not a whole number of 8-byte words, or there is no CUDA context.
    """

    def __init__(self, pages: PageTable, pool: HostPool, load_timeout: float) -> None:
        super().__init__(load_timeout)
        if any((table % WORD).any() for table in (pages.size, pages.stride, pages.base)):
            raise TransferError(f"pages of {pages.size.tolist()} bytes are not whole words of {WORD}")
        self._pages = pages
        self._pool = pool
        self._device = pages.keep[0].device
        self._host = torch.from_numpy(pool.bytes)
        self._row_bytes = pool.shape.row_bytes
        self._stage_rows = max(1, STAGE_BYTES // self._row_bytes)
        self._piece = slots_per_piece(pool.shape)
        self._tables = [
            torch.from_numpy(table).to(self._device)
            for table in (pages.base, pages.stride, pages.size // WORD, pages.offset // WORD)
        ]
        self._chunks = triton.cdiv(int(pages.size.max()) // WORD, BLOCK)
        self._tracks = {way: self._lay() for way in Way}
        self._warm_up()
        self._driver = Driver()
        self._growth = PoolGrowth(pool, self._driver.pin, self._enter, self._piece)
        self._open_lanes()

    def _lay(self) -> _Track:
        rings = [
            torch.empty(self._stage_rows * self._row_bytes, dtype=torch.uint8, device=self._device) for _ in range(RINGS)
        ]
        return _Track(torch.cuda.Stream(self._device), torch.cuda.Stream(self._device), rings, [None] * RINGS)

    def _warm_up(self) -> None:
        """Compile both kernels before the engine captures graphs: no row is moved."""
        for way, track in self._tracks.items():
            with torch.cuda.stream(track.kernel):
                self._launch(way, track.rings[0], torch.zeros(1, dtype=torch.int64, device=self._device), rows=0)
        torch.cuda.synchronize(self._device)

    # -- the main thread ---------------------------------------------------------------------------------------------

    def fence(self) -> object:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _over(self, job: Job) -> bool:
        if not job.marks.ended.query():
            return False
        job.nbytes = len(job.plan.blocks) * self._row_bytes
        job.seconds = job.marks.began.elapsed_time(job.marks.ended) / 1e3
        return True

    def _order(self, job: Job) -> None:
        torch.cuda.current_stream(self._device).wait_event(job.marks.ended)

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        pinned = self._growth.close(timeout)
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
        torch.cuda.set_device(self._device)

    def _issue(self, job: Job) -> None:
        plan, track = job.plan, self._tracks[job.plan.way]
        try:
            first, last = (track.copy, track.kernel) if plan.way is Way.LOAD else (track.kernel, track.copy)
            first.wait_event(job.after)
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record(first)
            blocks = torch.from_numpy(plan.blocks).pin_memory()
            with torch.cuda.stream(track.kernel):
                ids = blocks.to(self._device, non_blocking=True)
            for start in range(0, len(plan.blocks), self._stage_rows):
                rows = plan.rows[start : start + self._stage_rows]
                self._stage(plan.way, track, ids[start : start + len(rows)], rows)
            ended.record(last)
            job.marks = _Marks(began, ended, [blocks, ids])
        except Exception:
            track.copy.synchronize()  # what was issued of it must be over before its blocks are given back
            track.kernel.synchronize()
            raise

    def _stage(self, way: Way, track: _Track, ids: torch.Tensor, rows: Blocks) -> None:
        """Issue one stage: as much as a ring holds."""
        while len(track.ends) >= AHEAD:
            track.ends.popleft().synchronize()
        turn = track.turn = (track.turn + 1) % RINGS
        ring, free = track.rings[turn], track.free[turn]
        first, last = (track.copy, track.kernel) if way is Way.LOAD else (track.kernel, track.copy)
        if free is not None:
            first.wait_event(free)
        middle = torch.cuda.Event()
        if way is Way.LOAD:
            self._copy(way, track.copy, ring, rows)
            middle.record(first)
            last.wait_event(middle)
            self._scatter(way, track, ring, ids, len(rows))
        else:
            self._scatter(way, track, ring, ids, len(rows))
            middle.record(first)
            last.wait_event(middle)
            self._copy(way, track.copy, ring, rows)
        end = torch.cuda.Event(blocking=True)
        end.record(last)
        track.free[turn] = end
        track.ends.append(end)

    def _copy(self, way: Way, stream: torch.cuda.Stream, ring: torch.Tensor, rows: Blocks) -> None:
        size = self._row_bytes
        with torch.cuda.stream(stream):
            for at, row, count in runs(rows, self._piece * self._pool.shape.blocks_per_slot):
                device, host = ring[at * size : (at + count) * size], self._host[row * size : (row + count) * size]
                if way is Way.STORE:
                    host.copy_(device, non_blocking=True)
                else:
                    device.copy_(host, non_blocking=True)

    def _scatter(self, way: Way, track: _Track, ring: torch.Tensor, ids: torch.Tensor, rows: int) -> None:
        with torch.cuda.stream(track.kernel):
            self._launch(way, ring, ids, rows)

    def _launch(self, way: Way, ring: torch.Tensor, ids: torch.Tensor, rows: int) -> None:
        move_pages[(PROGRAMS,)](
            *self._tables, ids, ring.view(torch.int64), rows, len(self._pages.size), self._row_bytes // WORD,
            self._chunks, TO_PAGES=way is Way.LOAD, BLOCK=BLOCK,
        )  # fmt: skip


def runs(rows: Blocks, piece: int) -> Iterator[tuple[int, int, int]]:
    """(position, first row, number of rows) of each stretch of consecutive rows that stays within one pinned piece of
    `piece` rows: a copy may not span two."""
    cuts = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % piece == 0)) + 1
    edges = [0, *cuts.tolist(), len(rows)]
    for start, end in itertools.pairwise(edges):
        if end > start:
            yield start, int(rows[start]), end - start
