"""The CUDA data plane on a real GPU: every page, both ways, and what the streams promise."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA GPU here", allow_module_level=True)

from lmcache_ext.errors import TransferError  # noqa: E402 - as above
from lmcache_ext.transfer import (  # noqa: E402 - as above
    HostPool,
    PageTable,
    Plan,
    Result,
    cuda,
    gpu_pool,
    growth,
    open_transfer,
)
from lmcache_ext.transfer.base import Way  # noqa: E402 - needs a GPU
from lmcache_ext.transfer.cuda import CudaTransfer  # noqa: E402 - needs a GPU
from lmcache_ext.transfer.pool import Growth, Shape  # noqa: E402 - needs a GPU

Parts = tuple[dict[str, torch.Tensor], HostPool, CudaTransfer]
LAYERS, BLOCKS, BPC, SLOTS = 4, 300, 16, 24
PAGE = {"small": (2, 16, 32), "large": (8, 16, 256), "odd": (1, 16, 36), "mla": (64, 576)}


def layers(shape: tuple[int, ...], outer: str) -> dict[str, torch.Tensor]:
    """KV memory with layers outermost, blocks outermost, or one tensor a layer."""
    if outer == "layer":
        store = torch.randint(0, 1 << 15, (LAYERS, BLOCKS, *shape), dtype=torch.int16, device="cuda")
        return {f"l{i}": store[i] for i in range(LAYERS)}
    if outer == "block":
        store = torch.randint(0, 1 << 15, (BLOCKS, LAYERS, *shape), dtype=torch.int16, device="cuda")
        return {f"l{i}": store[:, i] for i in range(LAYERS)}
    return {
        f"l{i}": torch.randint(0, 1 << 15, (BLOCKS, *shape), dtype=torch.int16, device="cuda") for i in range(LAYERS)
    }


def grown(pool: HostPool) -> HostPool:
    deadline = time.monotonic() + 30
    while pool.grown < pool.shape.slots:
        assert time.monotonic() < deadline, f"{pool.grown} of {pool.shape.slots} chunks"
        time.sleep(0.001)
    return pool


CASES = [
    ("small", "layer"),
    ("small", "block"),
    ("large", "apart"),
    ("odd", "layer"),
    ("odd", "block"),
    ("mla", "layer"),
]


@pytest.fixture(params=CASES, ids="-".join)
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    """Stages of a few rows and pinned pieces of a few slots, so that every plan has many of both."""
    size, outer = request.param
    kv = layers(PAGE[size], outer)
    pages = PageTable.of(kv, BLOCKS)
    monkeypatch.setattr(cuda, "STAGE_BYTES", 7 * pages.row_bytes)
    monkeypatch.setattr(growth, "_PIECE_BYTES", 3 * BPC * pages.row_bytes)
    pool = HostPool.create(Shape(SLOTS, BPC, pages.row_bytes), "test")
    transfer = open_transfer(pages, pool, 5.0)
    assert isinstance(transfer, CudaTransfer)
    grown(pool)
    yield kv, pool, transfer
    transfer.close(5.0)


def plan(number: int, way: Way, blocks: np.ndarray, rows: np.ndarray) -> Plan:
    return Plan(number, way, blocks.astype(np.int64), rows.astype(np.int64))


def settle(transfer: CudaTransfer, count: int = 1) -> dict[int, Result]:
    deadline = time.monotonic() + 10
    results: dict[int, Result] = {}
    while len(results) < count:
        results.update((result.id, result) for result in transfer.poll())
        assert time.monotonic() < deadline
    return results


def clear(kv: dict[str, torch.Tensor], blocks: np.ndarray) -> None:
    index = torch.from_numpy(blocks).cuda()
    for t in kv.values():
        t[index] = 0


def test_there_and_back(parts: Parts) -> None:
    kv, pool, transfer = parts
    rng = np.random.default_rng(1)
    blocks, rows = rng.permutation(BLOCKS)[:200], rng.permutation(SLOTS * BPC)[:200]
    rows[50:150] = np.arange(50, 150)  # a stretch over many stages and pieces
    rows = np.array(list(dict.fromkeys(rows.tolist())))
    blocks = blocks[: len(rows)]
    before = {name: t.clone() for name, t in kv.items()}
    transfer.submit([plan(1, Way.STORE, blocks, rows)], transfer.fence())
    assert settle(transfer)[1].ok
    for block, row in zip(blocks, rows, strict=True):
        expected = torch.cat([kv[f"l{i}"][block].flatten() for i in range(LAYERS)]).cpu().numpy().view(np.uint8)
        assert np.array_equal(pool.row(int(row)), expected)
    clear(kv, blocks)
    transfer.submit([plan(2, Way.LOAD, blocks, rows)], transfer.fence())
    transfer.join([2])
    assert all(torch.equal(kv[name], before[name]) for name in kv)  # on the engine's stream: join ordered it
    assert settle(transfer)[2].ok


@pytest.mark.parametrize("size", ["large", "odd"])
def test_a_pool_on_the_gpu(size: str) -> None:
    """There, and back into other blocks; all of it can be used at once."""
    kv = layers(PAGE[size], "layer")
    pages = PageTable.of(kv, BLOCKS)
    pool = gpu_pool(Shape(SLOTS, BPC, pages.row_bytes), "test", 0)
    transfer = open_transfer(pages, pool, 5.0)
    assert pool.grown == SLOTS == Growth(pool.path, pool.shape, 1).slots()
    rng = np.random.default_rng(1)
    blocks, rows = rng.permutation(BLOCKS)[:120], rng.permutation(SLOTS * BPC)[:120]
    others = np.setdiff1d(np.arange(BLOCKS), blocks)[:120]
    transfer.submit([plan(1, Way.STORE, blocks, rows)], transfer.fence())
    assert settle(transfer)[1].ok
    transfer.submit([plan(2, Way.LOAD, others, rows)], transfer.fence())
    transfer.join([2])
    for t in kv.values():
        assert torch.equal(t[torch.from_numpy(others).cuda()], t[torch.from_numpy(blocks).cuda()])
    assert settle(transfer)[2].ok
    transfer.close(5.0)


def test_a_pool_that_the_gpu_has_no_room_for() -> None:
    with pytest.raises(TransferError, match="OUT_OF_MEMORY"):
        gpu_pool(Shape(1 << 20, BPC, 1 << 20), "test", 0)


def test_a_store_sees_the_work_before_its_fence(parts: Parts) -> None:
    kv, pool, transfer = parts
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy * 1e-3
    for t in kv.values():
        t.fill_(7)  # behind the matrix products
    everything = np.arange(BLOCKS)
    transfer.submit([plan(1, Way.STORE, everything, everything)], transfer.fence())
    assert settle(transfer)[1].ok
    assert (pool.bytes[: BLOCKS * pool.shape.row_bytes].view(np.int16) == 7).all()


def test_a_load_comes_behind_the_work_before_its_fence(parts: Parts) -> None:
    kv, _, transfer = parts
    before = {name: t.clone() for name, t in kv.items()}
    everything = np.arange(BLOCKS)
    transfer.submit([plan(1, Way.STORE, everything, everything)], transfer.fence())
    settle(transfer)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy * 1e-3
    for t in kv.values():
        t.fill_(7)  # a step that still writes blocks which the load is about to fill
    transfer.submit([plan(2, Way.LOAD, everything, everything)], transfer.fence())
    transfer.join([2])
    assert all(torch.equal(kv[name], before[name]) for name in kv)


def test_both_ways_at_once_and_many_plans(parts: Parts) -> None:
    kv, _, transfer = parts
    before = {name: t.clone() for name, t in kv.items()}
    low, high = np.arange(150), np.arange(150, 300)
    transfer.submit([plan(1, Way.STORE, low, low)], transfer.fence())
    settle(transfer)
    clear(kv, low)
    for i in range(15):
        part = slice(i * 10, i * 10 + 10)
        transfer.submit([plan(10 + i, Way.LOAD, low[part], low[part])], transfer.fence())
        transfer.submit([plan(40 + i, Way.STORE, high[part], high[part])], transfer.fence())
    assert all(result.ok for result in settle(transfer, 30).values())
    assert all(torch.equal(kv[name], before[name]) for name in kv)
    clear(kv, high)
    transfer.submit([plan(99, Way.LOAD, high, high)], transfer.fence())
    assert settle(transfer)[99].ok
    assert all(torch.equal(kv[name], before[name]) for name in kv)


def test_a_fault_is_a_result_and_the_lane_goes_on(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    kv, _, transfer = parts
    everything = np.arange(BLOCKS)

    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "_issue_native", broken)
        transfer.submit([plan(1, Way.LOAD, everything, everything)], transfer.fence())
        transfer.join([1])
        result = settle(transfer)[1]
    assert not result.ok and "injected" in result.error
    before = {name: t.clone() for name, t in kv.items()}
    transfer.submit([plan(2, Way.STORE, everything, everything)], transfer.fence())
    settle(transfer)
    clear(kv, everything)
    transfer.submit([plan(3, Way.LOAD, everything, everything)], transfer.fence())
    transfer.join([3])
    assert all(torch.equal(kv[name], before[name]) for name in kv)


def test_a_graph_is_captured_while_the_pool_grows() -> None:
    """vLLM captures in the mode in which any other thread's allocation would spoil it."""
    kv = layers(PAGE["large"], "layer")
    pages = PageTable.of(kv, BLOCKS)
    slots = (3 << 30) // (BPC * pages.row_bytes)
    pool = HostPool.create(Shape(slots, BPC, pages.row_bytes), "test")
    x = torch.ones(1024, 1024, device="cuda")
    torch.matmul(x, x)
    transfer = open_transfer(pages, pool, 5.0)
    Growth(pool.path, pool.shape, 1).serve()
    captures = 0
    while pool.grown < slots:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.matmul(x, x)
        graph.replay()
        captures += 1
    torch.cuda.synchronize()
    assert captures > 3, "the pool grew too fast to show anything"
    assert bool((y == 1024).all())
    transfer.close(5.0)
