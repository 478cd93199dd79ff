"""A pool grows piece by piece in the background, and stays as it is where memory or the right to lock it ends."""

from __future__ import annotations

import logging
import mmap
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from lmcache_ext.transfer import HostPool, growth
from lmcache_ext.transfer.growth import PoolGrowth, slots_per_piece
from lmcache_ext.transfer.pool import Growth, Shape


def nothing(*_: int) -> None:
    """A thread enters, or a piece is pinned."""


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pieces_are_whole_slots_and_whole_memory_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots_per_piece(Shape(100, 16, 2 << 20)) == 8  # of 32 MiB each
    assert slots_per_piece(Shape(100, 1, 1 << 30)) == 1
    monkeypatch.setattr(growth, "_PIECE_BYTES", 64 << 10)
    odd = Shape(1000, 3, 1000)
    assert slots_per_piece(odd) * odd.slot_bytes % mmap.PAGESIZE == 0


def test_grows_in_order_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_PIECE_BYTES", 1 << 20)
    shape = Shape(37, 2, 128 << 10)  # 256 KiB a slot, 4 a piece, the last one short
    pool = HostPool.create(shape, "test")
    pinned: list[tuple[int, int]] = []
    seen: list[int] = []

    def pin(address: int, nbytes: int) -> None:
        seen.append(pool.grown)
        pinned.append((address - pool.address, nbytes))

    grower = PoolGrowth(pool, pin, nothing, slots_per_piece(shape))
    until(lambda: pool.grown == 37)
    assert pinned == [(i << 20, min(1 << 20, shape.words_at - (i << 20))) for i in range(10)]
    assert seen == [i * 4 for i in range(10)]
    assert grower.close(5) == [pool.address + (i << 20) for i in range(10)]


def test_stays_as_large_as_it_got(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(growth, "_PIECE_BYTES", 1 << 20)
    shape = Shape(40, 2, 128 << 10)
    pool = HostPool.create(shape, "test")

    def pin(address: int, _: int) -> None:
        if address - pool.address >= 3 << 20:
            raise OSError("RLIMIT_MEMLOCK")

    with caplog.at_level(logging.ERROR):
        grower = PoolGrowth(pool, pin, nothing, slots_per_piece(shape))
        assert not grower.stopped
        until(lambda: bool(caplog.records))
        assert grower.stopped
    assert len(grower.close(5)) == 3
    assert pool.grown == 12
    assert "12 of 40" in caplog.text and "RLIMIT_MEMLOCK" in caplog.text


def test_leaves_memory_to_others_and_goes_on_when_there_is_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(growth, "_PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(growth, "_SHORT_SECONDS", 0.01)
    shape = Shape(40, 2, 128 << 10)
    pool = HostPool.create(shape, "test")
    left = [1 << 30]
    monkeypatch.setattr(growth, "memory_available", lambda: left[0])
    with caplog.at_level(logging.WARNING):
        grower = PoolGrowth(pool, nothing, nothing, slots_per_piece(shape))
        until(lambda: bool(caplog.records))
        time.sleep(0.05)
        assert pool.grown == 0
        left[0] = 10 << 30
        until(lambda: pool.grown == 40)
    grower.close(5)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 2  # said once, or by two at once
    assert grower.stopped
    assert "1025 MiB of memory are left" in caplog.text


def test_the_others_follow_the_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_PIECE_BYTES", 1 << 20)
    shape = Shape(8, 2, 128 << 10)
    pool = HostPool.create(shape, "test")
    follower = HostPool.attach(pool.path, shape, member=1)
    grower = PoolGrowth(follower, nothing, nothing, slots_per_piece(shape))
    time.sleep(0.05)
    assert follower.grown == 0
    pool.grown = 4
    until(lambda: follower.grown == 4)
    pool.grown = 8
    until(lambda: follower.grown == 8)
    grower.close(5)


@pytest.mark.parametrize("said", ["by the scheduler", "by a step"])
def test_most_of_it_waits_until_the_engine_has_started(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(growth, "_PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(growth, "_START_BYTES", 3 << 20)
    shape = Shape(40, 2, 128 << 10)
    pool = HostPool.create(shape, "test")
    grower = PoolGrowth(pool, nothing, nothing, slots_per_piece(shape))
    until(lambda: pool.grown == 12)
    time.sleep(0.05)
    assert pool.grown == 12
    if said == "by a step":
        grower.beat()
    else:
        scheduler = Growth(pool.path, shape, 1)
        assert scheduler.slots() == 12
        scheduler.serve()
    until(lambda: pool.grown == 40)
    grower.close(5)


def test_closing_ends_it_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "_PIECE_BYTES", 1 << 20)
    shape = Shape(400, 2, 128 << 10)
    pool = HostPool.create(shape, "test")
    began = threading.Event()

    def pin(*_: int) -> None:
        began.set()
        time.sleep(0.01)

    grower = PoolGrowth(pool, pin, nothing, slots_per_piece(shape))
    assert began.wait(5)
    addresses = grower.close(5)
    reached = pool.grown
    assert 0 < len(addresses) < 100 and reached == 4 * len(addresses)
    time.sleep(0.05)
    assert pool.grown == reached


# libc's madvise does nothing any more, as if somebody had rewritten it; then a pool grows, and its pages are counted.
REWRITTEN = """
import ctypes, mmap, time
from lmcache_ext.transfer.growth import PoolGrowth, slots_per_piece
from lmcache_ext.transfer.pool import HostPool, Shape

libc = ctypes.CDLL(None)
at = ctypes.cast(libc.madvise, ctypes.c_void_p).value
page = at & -mmap.PAGESIZE
assert libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), 7) == 0
ctypes.memmove(at, bytes.fromhex("31c0c3"), 3)  # xor eax, eax; ret
pool = HostPool.create(Shape(64, 2, 128 << 10), "test")
grower = PoolGrowth(pool, lambda *_: None, lambda: None, slots_per_piece(pool.grain))
deadline = time.monotonic() + 20
while pool.grown < 64 and time.monotonic() < deadline:
    time.sleep(0.01)
nbytes = 64 * 2 * (128 << 10)
there = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
assert libc.mincore(ctypes.c_void_p(pool.address), ctypes.c_size_t(nbytes), there) == 0
print(pool.grown, sum(byte & 1 for byte in there) / len(there))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="writes x86-64 instructions")
def test_memory_is_taken_past_the_function_that_ucx_rewrites() -> None:
    done = subprocess.run([sys.executable, "-c", REWRITTEN], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["64", "1.0"], done.stderr
