"""The one kernel of the CUDA data plane. Kept apart: it also runs, slowly, in Triton's interpreter without a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

WORD = 8
BLOCK = 1024  # words that a program copies at once


# Not specialized on any number: native code launches it, and an argument that equals 1 would be compiled away.
@triton.jit(do_not_specialize=["blocks", "rows", "layers", "row_words", "chunks"])
def move_pages(  # type: ignore[no-untyped-def]
    base, stride, size, offset, blocks, ring, rows, layers, row_words, chunks,
    TO_PAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy pages into rows of the ring, or back. Row i of the ring holds block `blocks[i]` of every layer.

    base, stride, size, offset: int64 [layers]: address of block 0, bytes from block to block, words of a page, and
    where the page begins in a row, in words. A tile is `BLOCK` words of one page; a page has `chunks` tiles, some of
    them empty where layers differ in size. The programs share the tiles evenly, in any number.
    """
    tiles = rows * layers * chunks
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        page = tile // chunks
        row, layer = page // layers, page % layers
        at = (tile % chunks) * BLOCK + tl.arange(0, BLOCK)
        inside = at < tl.load(size + layer)
        start = tl.load(base + layer) + tl.load(blocks + row) * tl.load(stride + layer)
        there = start.to(tl.pointer_type(tl.int64)) + at
        here = ring + row.to(tl.int64) * row_words + tl.load(offset + layer) + at
        if TO_PAGES:
            tl.store(there, tl.load(here, mask=inside), mask=inside)
        else:
            tl.store(here, tl.load(there, mask=inside), mask=inside)
