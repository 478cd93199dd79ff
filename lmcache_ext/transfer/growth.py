"""Takes a pool's memory and page-locks it piece by piece, in the background: at about half a second a GiB and thread it
would otherwise hold up the engine's start by half a minute for 60 GiB.

While the engine starts, only the first GiB is taken: it maps memory and calls the driver all the time then, and would
wait for us at every turn. It serves from the first second, with what there is. How far the pool has grown stands in its
word, which the scheduler reads.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import mmap
import os
import platform
import threading
import time
from collections.abc import Callable

from lmcache_ext.config import memory_available
from lmcache_ext.transfer.lanes import use_all_cores
from lmcache_ext.transfer.pool import Pool, Shape

logger = logging.getLogger("lmcache_ext.transfer")

_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_PIECE_BYTES = 256 << 20  # page-locking a piece holds up the driver's other callers meanwhile
_START_BYTES = 1 << 30  # taken while the engine starts
_RESERVE_BYTES = 1 << 30  # of the machine's or the cgroup's memory, left to everybody else
_SHORT_SECONDS = 1.0  # between looks whether there is memory again
_MOST_THREADS = 8
_WAIT_SECONDS = 0.02  # between looks: at the pool's maker, at whether the engine is busy
_BUSY_SECONDS = 0.1  # an engine that took a step within this time is busy
_BUSY_SHARE = 0.01  # of the time that pinning may take while it is: the driver's other callers wait meanwhile

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_MADVISE = {"x86_64": 28, "aarch64": 233}.get(platform.machine())


def _advise(address: int, nbytes: int, advice: int) -> int:
    """madvise(2), past libc's function of that name.

    UCX rewrites the beginning of that one in a running process, when NIXL first makes a UCX agent on a machine with
    CUDA, and waits some microseconds for whoever is in it. Taking a piece is one call of tenths of a second, which
    would then return into the middle of an instruction.
    """
    where, size = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    if _SYS_MADVISE is None:
        return int(_libc.madvise(where, size, advice))
    return int(_libc.syscall(ctypes.c_long(_SYS_MADVISE), where, size, ctypes.c_int(advice)))


def slots_per_piece(shape: Shape) -> int:
    """Whole slots and whole memory pages: pieces are locked one by one, and no slot may lie in two."""
    unit = math.lcm(shape.slot_bytes, mmap.PAGESIZE) // shape.slot_bytes
    return max(unit, _PIECE_BYTES // shape.slot_bytes // unit * unit)


class PoolGrowth:
    """Grows `pool` to its full size, from the moment it is made.

    The rank that made the pool takes the memory, with several threads; the others follow it. Every rank page-locks for
    itself. If memory or the right to lock it runs out, the pool stays as large as it got, and the log says so.

    Args:
        pin: pin(address, bytes), raises on failure. Called in order, from one thread at a time.
        enter: called by each thread first.
        piece: slots that are grown at once, see `slots_per_piece`.
    """

    def __init__(self, pool: Pool, pin: Callable[[int, int], None], enter: Callable[[], None], piece: int) -> None:
        self._pool, self._pin, self._enter, self._piece = pool, pin, enter, piece
        self._grain = pool.grain
        self._count = -(-self._grain.slots // piece)
        self._next = 0  # guarded by _lock; the next piece to take
        self._taken: set[int] = set()  # guarded by _lock; populated, not pinned
        self._pinned: list[int] = []  # addresses, in order; changed under _pinning
        self._lock, self._pinning = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._last_step = -math.inf
        self._short = False  # whether it was said that memory is short
        if pool.maker:
            _advise(pool.address, self._grain.words_at, _MADV_HUGEPAGE)
        wanted = min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2), self._count) if pool.maker else 1
        self._threads = [
            threading.Thread(target=self._run, name=f"lmcache-pool-{i}", daemon=True) for i in range(wanted)
        ]
        for thread in self._threads:
            thread.start()

    def beat(self) -> None:
        """The engine takes a step that needs the device."""
        self._last_step = time.monotonic()

    @property
    def stopped(self) -> bool:
        """Whether it grows no further."""
        return self._stop.is_set() or self._pool.grown >= self._grain.slots

    def close(self, timeout: float) -> list[int]:
        """Stop after the pieces under way. Returns the addresses that were pinned; they stay so."""
        self._stop.set()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self._pinned

    def _run(self) -> None:
        try:
            use_all_cores()
            self._enter()
            while not self._stop.is_set():
                with self._lock:
                    piece, self._next = self._next, self._next + 1
                if piece >= self._count:
                    return
                self._wait_for_start(piece)
                self._take(piece)
                if self._stop.is_set():
                    return
                with self._lock:
                    self._taken.add(piece)
                self._lock_down()
        except Exception as fault:
            if not self._stop.is_set():
                self._stop.set()
                logger.error(
                    "the host pool stays at %d of %d chunks (LMCACHE_MAX_LOCAL_CPU_SIZE): %s",
                    self._pool.grown,
                    self._grain.slots,
                    fault,
                )

    def _span(self, piece: int) -> tuple[int, int]:
        """(first slot, end) of a piece."""
        return piece * self._piece, min((piece + 1) * self._piece, self._grain.slots)

    def _bytes(self, piece: int) -> tuple[int, int]:
        """(address, bytes) of a piece, in whole memory pages."""
        first, end = self._span(piece)
        size = self._grain.slot_bytes
        stop = end * size if end < self._grain.slots else self._grain.words_at
        return self._pool.address + first * size, stop - first * size

    def _rest(self, taken: float) -> None:
        """After `taken` seconds that the engine may have felt: wait as long as it stays busy, and its share allows."""
        until = time.monotonic() + taken / _BUSY_SHARE
        while not self._stop.is_set() and time.monotonic() < min(until, self._last_step + _BUSY_SECONDS):
            time.sleep(_WAIT_SECONDS)

    def _wait_for_start(self, piece: int) -> None:
        """The engine has started when its scheduler says so, or takes a step. The first pieces do not wait."""
        if self._span(piece)[1] * self._grain.slot_bytes <= _START_BYTES:
            return
        while not (self._stop.is_set() or self._pool.serving or self._last_step > -math.inf):
            time.sleep(_WAIT_SECONDS)

    def _take(self, piece: int) -> None:
        if not self._pool.maker:
            while self._pool.made < self._span(piece)[1] and not self._stop.is_set():
                time.sleep(_WAIT_SECONDS)
            return
        address, nbytes = self._bytes(piece)
        self._wait_for_memory(nbytes)
        if self._stop.is_set():
            return
        if _advise(address, nbytes, _MADV_POPULATE_WRITE):
            code = ctypes.get_errno()
            if code != errno.EINVAL:  # Linux before 5.14 does not know it: pinning takes the pages then
                raise OSError(code, f"no memory for the next {nbytes >> 20} MiB: {os.strerror(code)}")

    def _wait_for_memory(self, nbytes: int) -> None:
        """Until that much is left besides the reserve: the kernel would rather kill us than say no."""
        while not self._stop.is_set() and memory_available() < nbytes + _RESERVE_BYTES:
            if not self._short:
                self._short = True
                logger.warning(
                    "less than %d MiB of memory are left: the host pool waits at %d of %d chunks",
                    (nbytes + _RESERVE_BYTES) >> 20,
                    self._pool.grown,
                    self._grain.slots,
                )
            self._stop.wait(_SHORT_SECONDS)

    def _lock_down(self) -> None:
        """Pin what was populated, in order, and say so. Who comes while another does leaves its piece to that one."""
        while self._pinning.acquire(blocking=False):
            try:
                while not self._stop.is_set():
                    piece = len(self._pinned)
                    with self._lock:
                        if piece not in self._taken:
                            break
                        self._taken.discard(piece)
                    began = time.monotonic()
                    self._pin(*self._bytes(piece))
                    self._rest(time.monotonic() - began)
                    self._pinned.append(self._bytes(piece)[0])
                    self._pool.grown = self._span(piece)[1]
                    if piece + 1 == self._count:
                        logger.info(
                            "the host pool of %.2f GB is complete after %.1f s",
                            self._grain.nbytes / (1 << 30),
                            time.monotonic() - self._began,
                        )
            finally:
                self._pinning.release()
            with self._lock:  # a piece that came between the last look and the release is nobody else's
                if len(self._pinned) not in self._taken:
                    return
            if self._stop.is_set():
                return
