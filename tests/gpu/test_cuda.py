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

from lmcache_ext.transfer import HostPool, PageTable, Plan, Result, open_transfer  # noqa: E402 - needs a GPU
from lmcache_ext.transfer.base import Way  # noqa: E402 - needs a GPU
from lmcache_ext.transfer.cuda import CudaTransfer, runs  # noqa: E402 - needs a GPU
from lmcache_ext.transfer.pool import Shape  # noqa: E402 - needs a GPU

LAYERS, BLOCKS, BPC, SLOTS = 4, 300, 16, 24
PAGE = {"small": (2, 16, 32), "large": (8, 16, 256), "odd": (1, 16, 36)}


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


@pytest.fixture(params=[(size, outer) for size in PAGE for outer in ("layer", "block", "apart")], ids=str)
def parts(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, torch.Tensor], HostPool, CudaTransfer]]:
    size, outer = request.param
    kv = layers(PAGE[size], outer)
    pages = PageTable.of(kv, BLOCKS)
    pool = HostPool.create(Shape(SLOTS, BPC, pages.row_bytes), "test")
    transfer = open_transfer(pages, pool, 5.0)
    assert isinstance(transfer, CudaTransfer)
    yield kv, pool, transfer
    transfer.close(5.0)


def plan(number: int, way: Way, blocks: np.ndarray, rows: np.ndarray) -> Plan:
    return Plan(number, way, blocks.astype(np.int64), rows.astype(np.int64))


def settle(transfer: CudaTransfer) -> list[Result]:
    deadline = time.monotonic() + 10
    while not (results := transfer.poll()):
        assert time.monotonic() < deadline
    return results


def test_there_and_back(parts: tuple[dict[str, torch.Tensor], HostPool, CudaTransfer]) -> None:
    kv, pool, transfer = parts
    rng = np.random.default_rng(1)
    blocks, rows = rng.permutation(BLOCKS)[:200], rng.permutation(SLOTS * BPC)[:200]
    before = {name: t.clone() for name, t in kv.items()}
    transfer.submit([plan(1, Way.STORE, blocks, rows)], transfer.fence())
    assert settle(transfer)[0].ok
    for block, row in zip(blocks[:20], rows[:20], strict=True):
        expected = torch.cat([kv[f"l{i}"][block].flatten() for i in range(LAYERS)]).cpu().numpy().view(np.uint8)
        assert np.array_equal(pool.row(int(row)), expected)
    index = torch.from_numpy(blocks).cuda()
    for t in kv.values():
        t[index] = 0
    transfer.submit([plan(2, Way.LOAD, blocks, rows)], transfer.fence())
    transfer.join([2])
    assert all(torch.equal(kv[name], before[name]) for name in kv)  # on the engine's stream: join ordered it
    assert settle(transfer)[0].ok


def test_a_store_sees_the_work_before_its_fence_and_a_load_waits_for_it(
    parts: tuple[dict[str, torch.Tensor], HostPool, CudaTransfer],
) -> None:
    kv, pool, transfer = parts
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy * 1e-3
    for t in kv.values():
        t.fill_(7)  # behind the matrix products
    everything = np.arange(BLOCKS)
    transfer.submit([plan(1, Way.STORE, everything, everything)], transfer.fence())
    assert settle(transfer)[0].ok
    assert (pool.bytes[: BLOCKS * pool.shape.row_bytes].view(np.int16) == 7).all()


def test_runs_of_rows() -> None:
    rows = np.array([5, 6, 7, 2, 9, 10], dtype=np.int64)
    assert list(runs(rows)) == [(0, 5, 3), (3, 2, 1), (4, 9, 2)]
