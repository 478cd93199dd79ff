"""The CUDA plane's kernel against a plain reference, in Triton's interpreter: runs without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with the locked packages; an install without it has no CUDA plane")

from lmcache_ext.transfer import PageTable
from tests.interpreted import kernels

BLOCKS = 12


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    with kernels() as module:
        yield module


def memory(layout: str) -> dict[str, torch.Tensor]:
    """KV of three layers, the last of another size where they lie apart; more than one tile a page."""
    if layout == "layer":
        store = torch.randint(0, 1 << 15, (3, BLOCKS, 4, 16, 80), dtype=torch.int16)
        return {f"l{i}": store[i] for i in range(3)}
    if layout == "block":
        store = torch.randint(0, 1 << 15, (BLOCKS, 3, 4, 16, 80), dtype=torch.int16)
        return {f"l{i}": store[:, i] for i in range(3)}
    return {
        f"l{i}": torch.randint(0, 1 << 15, (BLOCKS, 4, 16, 80 - 40 * (i == 2)), dtype=torch.int16) for i in range(3)
    }


def bytes_of(kv: dict[str, torch.Tensor], block: int) -> np.ndarray:
    """What a row must hold: the block of every layer, one behind the other."""
    return np.concatenate([t[block].contiguous().view(torch.uint8).numpy().ravel() for t in kv.values()])


@pytest.mark.parametrize("programs", [1, 5, 64])
@pytest.mark.parametrize("layout", ["layer", "block", "apart"])
def test_rows_and_pages(kernel: Any, layout: str, programs: int) -> None:
    kv = memory(layout)
    pages = PageTable.of(kv, BLOCKS)
    row = pages.row_bytes
    blocks = torch.tensor([7, 0, 11, 3], dtype=torch.int64)
    ring = torch.zeros(6 * row, dtype=torch.uint8)

    def move(to_pages: bool) -> None:
        tables = (pages.base, pages.stride, pages.size // kernel.WORD, pages.offset // kernel.WORD)
        chunks = -(-int(pages.size.max()) // kernel.WORD // kernel.BLOCK)
        assert chunks > 1
        kernel.move_pages[(programs,)](
            *[torch.from_numpy(t) for t in tables], blocks, ring.view(torch.int64), len(blocks), 3, row // kernel.WORD,
            chunks, TO_PAGES=to_pages, BLOCK=kernel.BLOCK,
        )  # fmt: skip

    move(to_pages=False)
    for i, block in enumerate(blocks.tolist()):
        assert np.array_equal(ring[i * row : (i + 1) * row].numpy(), bytes_of(kv, block))
    assert not ring[len(blocks) * row :].any()

    before = {name: t.clone() for name, t in kv.items()}
    for t in kv.values():
        t[blocks] = -1
    untouched = {name: t.clone() for name, t in kv.items()}
    move(to_pages=True)
    others = [b for b in range(BLOCKS) if b not in blocks.tolist()]
    for name, t in kv.items():
        assert torch.equal(t, before[name])
        assert torch.equal(t[others], untouched[name][others])
