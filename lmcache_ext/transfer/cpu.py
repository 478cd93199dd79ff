"""The CPU data plane: batches of memcpy in native calls that release the GIL.

Page copies from Python run at 1.4 to 2.9 GB/s because each one fights the main thread for the GIL. One native call for
many pages runs at what a core can copy, and several cores copy more than one (4.8 and 9 GB/s with one and two).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import numpy as np

from lmcache_ext import native
from lmcache_ext.native import call
from lmcache_ext.transfer.base import Blocks, Way
from lmcache_ext.transfer.lanes import Job, LaneTransfer
from lmcache_ext.transfer.pages import PageTable
from lmcache_ext.transfer.pool import Pool

Copy = Callable[[Blocks, Blocks, Blocks], None]
"""copy(target addresses, source addresses, sizes in bytes), all int64 [n]."""

_MOST_CORES = 4
_SHARE_BYTES = 1 << 20  # what is worth another core


def _copy(memcpy: int, target: Blocks, source: Blocks, size: Blocks) -> None:
    for i in range(target.shape[0]):
        call(memcpy, (target[i], source[i], size[i]))


def compile_copy() -> Copy:
    """The native batch copy."""
    array = "int64[::1]"
    memcpy = native.address_of(ctypes.CDLL(None).memcpy)
    return partial(native.compiled(_copy, f"void(int64, {array}, {array}, {array})"), memcpy)


class CpuTransfer(LaneTransfer):
    """KV memory and pool are both host memory. The pool's pages are taken as they are first written, so all of it
    serves at once."""

    def __init__(self, pages: PageTable, pool: Pool, load_timeout: float, copy: Copy | None = None) -> None:
        super().__init__(load_timeout)
        self._pages = pages
        self._pool = pool
        self._copy = copy or compile_copy()
        # Loads alone: somebody waits for them, while stores run beside the engine's own work.
        self._helpers = ThreadPoolExecutor(min(_MOST_CORES, os.cpu_count() or 1), thread_name_prefix="lmcache-load")
        self._open_lanes()
        pool.grown = pool.grain.slots

    def fence(self) -> object:
        """Host code is in order already."""
        return None

    def _enter(self) -> None:
        """Nothing to prepare."""

    def _issue(self, job: Job) -> None:
        began = time.monotonic()
        pages, plan = self._pages, job.plan
        kv = (pages.base[None, :] + plan.blocks[:, None] * pages.stride[None, :]).ravel()
        host = (self._pool.address + self._pool.at(plan.rows)[:, None] + pages.offset[None, :]).ravel()
        sizes = np.tile(pages.size, len(plan.blocks))
        if plan.way is Way.STORE:
            self._copy(host, kv, sizes)
        else:
            self._copy_together(kv, host, sizes)
        job.nbytes, job.seconds = int(sizes.sum()), time.monotonic() - began

    def _copy_together(self, target: Blocks, source: Blocks, sizes: Blocks) -> None:
        shares = int(min(_MOST_CORES, os.cpu_count() or 1, max(1, sizes.sum() // _SHARE_BYTES), len(sizes)))
        cuts = np.linspace(0, len(sizes), shares + 1).astype(np.int64).tolist()
        parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        helped = [self._helpers.submit(self._copy, target[p], source[p], sizes[p]) for p in parts[1:]]
        try:
            self._copy(target[parts[0]], source[parts[0]], sizes[parts[0]])
        finally:
            wait(helped)  # memcpy ends; nothing may still be under way when this returns
        for one in helped:
            one.result(0)

    def _over(self, job: Job) -> bool:
        return True

    def close(self, timeout: float) -> None:
        super().close(timeout)
        self._helpers.shutdown(wait=False)

    def _order(self, job: Job) -> None:
        """What was issued is done."""
