"""A server's segment as a pool: where rows lie, and copies to and from it."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from lmcache_ext.transfer import PageTable
from lmcache_ext.transfer.base import Way
from lmcache_ext.transfer.cpu import CpuTransfer
from lmcache_ext.transfer.segment import PAGE, Segment, SegmentPool
from tests.transfer.test_cpu import BLOCKS, BPC, COPY, plan, settle, tensors

ROW = 5000  # no multiple of a memory page
EXTENT = 16 * PAGE


@pytest.fixture
def segment():
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4 * EXTENT)
    yield Segment(f"/proc/{os.getpid()}/fd/{fd}", 4 * EXTENT, EXTENT, (0, 5 * PAGE), BPC)
    os.close(fd)


def test_rows_lie_behind_their_slots_start(segment: Segment) -> None:
    pool = SegmentPool(segment, 1, ROW)
    rows = np.array([2 * BPC, 2 * BPC + 2, 7 * BPC + 1], dtype=np.int64)
    assert pool.at(rows).tolist() == [7 * PAGE, 7 * PAGE + 2 * ROW, 12 * PAGE + ROW]
    assert (pool.grain.slots, pool.grain.slot_bytes, pool.whole) == (4, EXTENT, False)


def test_another_size_is_refused(segment: Segment) -> None:
    wrong = Segment(segment.path, segment.nbytes + PAGE, EXTENT, segment.starts, BPC)
    with pytest.raises(OSError, match="expected"):
        SegmentPool(wrong, 0, ROW)


def test_two_ranks_keep_to_their_parts(segment: Segment) -> None:
    caches = [tensors(), tensors()]
    tables = [PageTable.of(kv, BLOCKS) for kv in caches]
    pools = [SegmentPool(segment, rank, tables[rank].row_bytes) for rank in range(2)]
    planes = [CpuTransfer(table, pool, 5.0, COPY) for table, pool in zip(tables, pools, strict=True)]
    assert all(pool.whole for pool in pools)
    kept = [{name: page.clone() for name, page in kv.items()} for kv in caches]
    rows = [3 * BPC, 3 * BPC + 1, 20 * BPC]
    for way in Way:
        for plane in planes:
            plane.submit([plan(way.value == "load", way, [0, 1, 2], rows)], None)
            assert settle(plane)[0].ok
        for kv in caches:
            for page in kv.values():
                if way is Way.STORE:
                    page[:3] = 0
    for plane in planes:
        plane.close(1.0)
    assert all(torch.equal(kv[name], was[name]) for kv, was in zip(caches, kept, strict=True) for name in kv)
