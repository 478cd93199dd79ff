"""The CUDA data plane: pages are gathered into, or scattered from, a staging ring on the GPU by one kernel, and the
ring meets the pinned pool in large copies.

    store: pages ──gather──▶ ring ──DMA──▶ rows of the pool          (on a stream of the lowest priority)
    load:  rows of the pool ──DMA──▶ ring ──scatter──▶ pages         (on a stream of its own)

The kernel runs at device-memory speed, so the link is what counts, whatever the page size. Everything is submitted from
the engine worker's main thread; completion is an event that `poll` queries, so no thread of ours touches CUDA while the
engine captures graphs.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from lmcache_ext.errors import TransferError
from lmcache_ext.transfer.base import Blocks, Plan, Result, Transfer, Way
from lmcache_ext.transfer.pages import PageTable
from lmcache_ext.transfer.pool import HostPool

logger = logging.getLogger("lmcache_ext.transfer")

STAGE_BYTES = 64 << 20
_WORD = 8
_BLOCK = 1024  # words that one program copies


@triton.jit
def _move(base, stride, size, offset, blocks, ring, row_words, layers, TO_PAGES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program (i, c): words [c*BLOCK, (c+1)*BLOCK) of layer i % layers of the block in row i // layers of the ring."""
    i = tl.program_id(0)
    row, layer = i // layers, i % layers
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(size + layer)
    start = tl.load(base + layer) + tl.load(blocks + row) * tl.load(stride + layer)
    page = start.to(tl.pointer_type(tl.int64)) + at
    stage = ring + row.to(tl.int64) * row_words + tl.load(offset + layer) + at
    if TO_PAGES:
        tl.store(page, tl.load(stage, mask=inside), mask=inside)
    else:
        tl.store(stage, tl.load(page, mask=inside), mask=inside)


@dataclass
class _Lane:
    """One direction: a stream, and a ring that is used in stream order."""

    stream: torch.cuda.Stream
    rings: list[torch.Tensor]
    turn: int = 0

    def ring(self) -> torch.Tensor:
        """The next stage's ring; alternating lets a kernel of one stage run beside the copy of another."""
        self.turn ^= 1
        return self.rings[self.turn]


@dataclass
class _Open:
    plan: Plan
    nbytes: int
    began: torch.cuda.Event
    ended: torch.cuda.Event
    keep: list[Any]  # what the copies still read


class CudaTransfer(Transfer):
    """KV memory on the GPU, pool in pinned host memory.

    Raises:
        TransferError: the pool can't be pinned, or a page is not a whole number of 8-byte words.
    """

    def __init__(self, pages: PageTable, pool: HostPool, load_timeout: float) -> None:
        if (pages.size % _WORD).any() or (pages.stride % _WORD).any() or (pages.base % _WORD).any():
            raise TransferError(f"pages of {pages.size.tolist()} bytes are not whole words of {_WORD}")
        self._pages = pages
        self._pool = pool
        self._device = pages.keep[0].device
        self._host = _pin(pool)
        self._row_bytes = pool.shape.row_bytes
        self._stage_rows = max(1, STAGE_BYTES // self._row_bytes)
        self._tables = [
            torch.from_numpy(table).to(self._device)
            for table in (pages.base, pages.stride, pages.size // _WORD, pages.offset // _WORD)
        ]
        self._most_words = int(pages.size.max()) // _WORD
        least, _ = torch.cuda.Stream.priority_range() if hasattr(torch.cuda.Stream, "priority_range") else (0, -1)
        self._lanes = {Way.LOAD: self._lane(0), Way.STORE: self._lane(least)}
        self._open: list[_Open] = []
        self._failed: list[Result] = []
        self._warm_up()

    def _lane(self, priority: int) -> _Lane:
        rings = [
            torch.empty(self._stage_rows * self._row_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)
        ]
        return _Lane(torch.cuda.Stream(self._device, priority=priority), rings)

    def _warm_up(self) -> None:
        """Compile both kernels before the engine captures graphs: no row is moved."""
        for way, lane in self._lanes.items():
            with torch.cuda.stream(lane.stream):
                self._kernel(way, lane.ring(), torch.zeros(1, dtype=torch.int64, device=self._device), rows=0)
        torch.cuda.synchronize(self._device)

    def fence(self) -> object:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def submit(self, plans: Iterable[Plan], after: object) -> None:
        assert isinstance(after, torch.cuda.Event)
        for plan in plans:
            lane = self._lanes[plan.way]
            lane.stream.wait_event(after)
            try:
                self._launch(plan, lane)
            except Exception as fault:
                logger.exception("%s of plan %d failed", plan.way.value, plan.id)
                lane.stream.synchronize()  # what was launched of it must be over before its blocks are given back
                self._failed.append(Result(plan.id, plan.way, False, 0, 0.0, f"{type(fault).__name__}: {fault}"))

    def join(self, ids: Collection[int]) -> None:
        for work in self._open:
            if work.plan.id in ids:
                torch.cuda.current_stream(self._device).wait_event(work.ended)

    def poll(self) -> list[Result]:
        results, self._failed = self._failed, []
        still = []
        for work in self._open:
            if work.ended.query():
                seconds = work.began.elapsed_time(work.ended) / 1e3
                results.append(Result(work.plan.id, work.plan.way, True, work.nbytes, seconds))
            else:
                still.append(work)
        self._open = still
        return results

    def cancel(self, ids: Collection[int]) -> None:
        """Plans are in a queue of the device the moment they are submitted: all run on."""

    def close(self, timeout: float) -> None:
        for lane in self._lanes.values():
            lane.stream.synchronize()
        torch.cuda.cudart().cudaHostUnregister(self._pool.address)

    def _launch(self, plan: Plan, lane: _Lane) -> None:
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        keep: list[Any] = []
        with torch.cuda.stream(lane.stream):
            began.record()
            blocks = torch.from_numpy(plan.blocks).pin_memory()
            ids = blocks.to(self._device, non_blocking=True)
            keep += [blocks, ids]
            for start in range(0, len(plan.blocks), self._stage_rows):
                rows = plan.rows[start : start + self._stage_rows]
                self._stage(plan.way, lane.ring(), ids[start : start + len(rows)], rows)
            ended.record()
        self._open.append(_Open(plan, len(plan.blocks) * self._row_bytes, began, ended, keep))

    def _stage(self, way: Way, ring: torch.Tensor, ids: torch.Tensor, rows: Blocks) -> None:
        if way is Way.STORE:
            self._kernel(way, ring, ids, len(rows))
        for at, row, count in runs(rows):
            device = ring[at * self._row_bytes : (at + count) * self._row_bytes]
            host = self._host[row * self._row_bytes : (row + count) * self._row_bytes]
            if way is Way.STORE:
                host.copy_(device, non_blocking=True)
            else:
                device.copy_(host, non_blocking=True)
        if way is Way.LOAD:
            self._kernel(way, ring, ids, len(rows))

    def _kernel(self, way: Way, ring: torch.Tensor, ids: torch.Tensor, rows: int) -> None:
        layers = len(self._pages.size)
        grid = (max(1, rows * layers), triton.cdiv(self._most_words, _BLOCK))
        sizes = self._tables[2] if rows else torch.zeros_like(self._tables[2])
        base, stride, _, offset = self._tables
        _move[grid](
            base, stride, sizes, offset, ids, ring.view(torch.int64), self._row_bytes // _WORD, layers,
            TO_PAGES=way is Way.LOAD, BLOCK=_BLOCK,
        )  # fmt: skip


def runs(rows: Blocks) -> Iterator[tuple[int, int, int]]:
    """(position, first row, number of rows) of each stretch of consecutive rows."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *cuts.tolist(), len(rows)]
    for start, end in itertools.pairwise(edges):
        if end > start:
            yield start, int(rows[start]), end - start


def _pin(pool: HostPool) -> torch.Tensor:
    """[bytes] the pool as a pinned tensor."""
    status = torch.cuda.cudart().cudaHostRegister(pool.address, pool.shape.nbytes, 0)
    if int(status) != 0:
        raise TransferError(f"cudaHostRegister of {pool.shape.nbytes} bytes failed with {status}; see `ulimit -l`")
    return torch.from_numpy(pool.bytes)
