"""The kernels: one moves pages, one sums. Kept apart: they also run, slowly, in Triton's interpreter without a GPU.

No function of Triton's own library is called: those can't be interpreted once it was imported to compile.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORD = 8
BLOCK = 1024  # words that a program handles at once


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


@triton.jit
def _mixed(x):  # type: ignore[no-untyped-def]
    """Of 64 bits 64 others."""
    x = (x ^ (x >> 31)) * 0x3F58476D1CE4E5B9
    x = (x ^ (x >> 29)) * 0x14D049BB133111EB
    return x ^ (x >> 32)


@triton.jit
def _plus(a, b):  # type: ignore[no-untyped-def]
    return a + b


@triton.jit
def add_words(table, totals, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum runs of words: what falls to each program of each run, which still has to be added up.

    Word i of what is summed, plus a multiple of i + 1, is mixed in two ways, each of which can be undone; a sum is the
    two totals modulo 2^64. So a single word that differs always shows, any others but once in 2^128, and the order in
    which they are added does not matter.

    table: int64 [runs, 3]: address, words, and words of the same sum that come before. totals: int64 [runs, programs,
    2], all of it written. The grid is (programs, runs).
    """
    row = table + 3 * tl.program_id(1)
    words = tl.load(row).to(tl.pointer_type(tl.int64))
    count, before = tl.load(row + 1), tl.load(row + 2)
    first, second = tl.full((BLOCK,), 0, tl.uint64), tl.full((BLOCK,), 0, tl.uint64)
    for tile in range(tl.program_id(0), (count + BLOCK - 1) // BLOCK, tl.num_programs(0)):
        at = tl.arange(0, BLOCK).to(tl.int64) + tile * BLOCK
        inside = at < count
        word = tl.load(words + at, mask=inside, other=0).to(tl.uint64, bitcast=True)
        place = (at + before + 1).to(tl.uint64, bitcast=True)
        one = _mixed(word + place * 0x1E3779B97F4A7C15)
        two = _mixed(one ^ 0x2545F4914F6CDD1D)
        first += tl.where(inside, one, 0)
        second += tl.where(inside, two, 0)
    mine = totals + 2 * (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
    tl.store(mine, tl.reduce(first, 0, _plus).to(tl.int64, bitcast=True))
    tl.store(mine + 1, tl.reduce(second, 0, _plus).to(tl.int64, bitcast=True))
