"""The CPU data plane moves exactly the pages of a plan, whatever goes on beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from lmcache_ext.errors import LayoutError
from lmcache_ext.transfer import HostPool, PageTable, Plan, Result, open_transfer
from lmcache_ext.transfer.base import Way
from lmcache_ext.transfer.cpu import CpuTransfer, compile_copy
from lmcache_ext.transfer.pool import Shape

BLOCKS, LAYERS, BPC = 40, 3, 4
COPY = compile_copy()


def tensors(shape: tuple[int, ...] = (BLOCKS, 2, 8, 16)) -> dict[str, torch.Tensor]:
    store = torch.randint(0, 255, (LAYERS, *shape), dtype=torch.uint8)
    return {f"l{i}": store[i] for i in range(LAYERS)}


@pytest.fixture
def parts() -> Iterator[tuple[dict[str, torch.Tensor], HostPool, CpuTransfer]]:
    kv = tensors()
    pages = PageTable.of(kv, BLOCKS)
    pool = HostPool.create(Shape(10, BPC, pages.row_bytes), "test")
    transfer = CpuTransfer(pages, pool, 5.0, COPY)
    yield kv, pool, transfer
    transfer.close(5.0)
    pool.close()


def plan(number: int, way: Way, blocks: list[int], rows: list[int]) -> Plan:
    return Plan(number, way, np.array(blocks, dtype=np.int64), np.array(rows, dtype=np.int64))


def settle(transfer: CpuTransfer, count: int = 1) -> list[Result]:
    results: list[Result] = []
    deadline = time.monotonic() + 10
    while len(results) < count:
        assert time.monotonic() < deadline
        results += transfer.poll()
        time.sleep(0.001)
    return results


def test_a_row_holds_one_block_of_every_layer(parts: tuple[dict[str, torch.Tensor], HostPool, CpuTransfer]) -> None:
    kv, pool, transfer = parts
    transfer.submit([plan(1, Way.STORE, [7, 3], [5, 0])], transfer.fence())
    assert settle(transfer)[0].ok
    for block, row in ((7, 5), (3, 0)):
        expected = np.concatenate([kv[f"l{i}"][block].numpy().ravel() for i in range(LAYERS)])
        assert np.array_equal(pool.row(row), expected)


def test_there_and_back_touches_nothing_else(parts: tuple[dict[str, torch.Tensor], HostPool, CpuTransfer]) -> None:
    kv, _, transfer = parts
    before = {name: t.clone() for name, t in kv.items()}
    blocks, rows = [1, 30, 2, 9], [4, 5, 6, 7]
    transfer.submit([plan(1, Way.STORE, blocks, rows)], None)
    settle(transfer)
    for t in kv.values():
        t[blocks] = 0
    transfer.submit([plan(2, Way.LOAD, blocks, rows)], None)
    transfer.join([2])
    assert settle(transfer)[0].nbytes == len(blocks) * 3 * 2 * 8 * 16
    assert all(torch.equal(kv[name], before[name]) for name in kv)


def test_plans_of_one_row_and_of_many(parts: tuple[dict[str, torch.Tensor], HostPool, CpuTransfer]) -> None:
    _, _, transfer = parts
    for i in range(1, 20):
        transfer.submit([plan(i, Way.STORE, list(range(i)), list(range(i)))], None)
    assert all(result.ok for result in settle(transfer, 19))


def test_a_fault_is_a_result(parts: tuple[dict[str, torch.Tensor], HostPool, CpuTransfer]) -> None:
    _, _, transfer = parts

    def broken(*_: object) -> None:
        raise OSError("no such page")

    transfer._copy = broken
    transfer.submit([plan(1, Way.LOAD, [1], [1])], None)
    transfer.join([1])
    result = settle(transfer)[0]
    assert not result.ok and "no such page" in result.error


def test_what_has_not_begun_can_be_cancelled(parts: tuple[dict[str, torch.Tensor], HostPool, CpuTransfer]) -> None:
    _, _, transfer = parts
    go = threading.Event()

    def waits(*arrays: np.ndarray) -> None:
        assert go.wait(5)
        COPY(*arrays)

    transfer._copy = waits
    transfer.submit([plan(1, Way.STORE, [1], [1]), plan(2, Way.STORE, [2], [2])], None)
    time.sleep(0.05)
    transfer.cancel([1, 2])
    go.set()
    results = {r.id: r for r in settle(transfer, 2)}
    assert results[1].ok and not results[2].ok and results[2].error == "cancelled"


def test_a_load_that_waited_too_long_does_not_begin() -> None:
    kv = tensors()
    pages = PageTable.of(kv, BLOCKS)
    pool = HostPool.create(Shape(10, BPC, pages.row_bytes), "test")
    transfer = CpuTransfer(pages, pool, 0.0, lambda *a: time.sleep(0.02))
    transfer.submit([plan(1, Way.LOAD, [1], [1]), plan(2, Way.LOAD, [1], [1])], None)
    assert "not begun" in {r.id: r for r in settle(transfer, 2)}[2].error
    transfer.close(5)


def test_stores_and_loads_run_beside_each_other(parts: tuple[dict[str, torch.Tensor], HostPool, CpuTransfer]) -> None:
    _, _, transfer = parts
    both = threading.Barrier(2)
    transfer._copy = lambda *a: both.wait(timeout=5) and None
    transfer.submit([plan(1, Way.STORE, [1], [1]), plan(2, Way.LOAD, [2], [2])], None)
    assert all(result.ok for result in settle(transfer, 2))


def test_copy_threads_are_not_bound_to_the_engines_core() -> None:
    import os

    mine = os.sched_getaffinity(0)
    seen: list[set[int]] = []
    try:
        os.sched_setaffinity(0, {min(mine)})
        kv = tensors()
        pages = PageTable.of(kv, BLOCKS)
        pool = HostPool.create(Shape(10, BPC, pages.row_bytes), "test")
        transfer = CpuTransfer(pages, pool, 5.0, lambda *a: seen.append(os.sched_getaffinity(0)))
        transfer.submit([plan(1, Way.STORE, [1], [1])], None)
        settle(transfer)
        transfer.close(5)
    finally:
        os.sched_setaffinity(0, mine)
    assert seen == [mine]


def test_the_data_plane_is_chosen_by_the_tensors_device() -> None:
    pages = PageTable.of(tensors(), BLOCKS)
    pool = HostPool.create(Shape(10, BPC, pages.row_bytes), "test")
    transfer = open_transfer(pages, pool, 1.0)
    assert isinstance(transfer, CpuTransfer)
    transfer.close(5)
    meta = PageTable("meta", 1, pages.base, pages.stride, pages.size, "x", pages.keep)
    with pytest.raises(LayoutError, match="meta"):
        open_transfer(meta, pool, 1.0)


def test_what_was_prepared_is_taken_back_however_it_ends(
    parts: tuple[dict[str, torch.Tensor], HostPool, CpuTransfer],
) -> None:
    _, _, transfer = parts
    go, released = threading.Event(), []
    transfer._copy = lambda *a: go.wait(5) and None
    transfer._release = lambda job: released.append(job.plan.id)  # type: ignore[method-assign]
    transfer.submit([plan(1, Way.STORE, [1], [1]), plan(2, Way.STORE, [2], [2])], None)
    transfer.cancel([2])
    go.set()
    settle(transfer, 2)
    assert released == [1, 2]
