"""Sums of slots in a GPU's memory, taken there (`transfer.kernel.add_words`): 128 bits, against accidents."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from lmcache_ext.pd.agent import Memory
from lmcache_ext.pd.parts import Runs
from lmcache_ext.transfer.kernel import BLOCK, WORD, add_words

_RUNS = 64  # that are summed at once
_PROGRAMS = 64  # for each
Totals = npt.NDArray[np.uint64]
_HIGH = -1  # a stream's priority: sums are short, and somebody waits


class GpuSums:
    """Takes sums of `memory`'s slots, for any thread. `transfer.cuda.compile_sums` has compiled the kernel."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._device = torch.device("cuda", memory.device_id)
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(priority=_HIGH)
            self._event = torch.cuda.Event(blocking=True)
            self._table = torch.zeros(_RUNS, 3, dtype=torch.int64, device=self._device)
            self._totals = torch.zeros(_RUNS, _PROGRAMS, 2, dtype=torch.int64, device=self._device)
            self._asked = torch.zeros(_RUNS, 3, dtype=torch.int64, pin_memory=True)
            self._answer = torch.zeros(_RUNS, _PROGRAMS, 2, dtype=torch.int64, pin_memory=True)
            torch.cuda.current_stream().synchronize()

    def __call__(self, asked: Sequence[tuple[int, Runs]]) -> Iterator[bytes]:
        """See `Sums`. Runs are whole words."""
        table = []
        for slot, runs in asked:
            start, before = self._memory.address + slot * self._memory.slot_bytes, 0
            for offset, nbytes in runs:
                table.append((start + offset, nbytes // WORD, before))
                before += nbytes // WORD
        parts = [self._take(table[i : i + _RUNS]) for i in range(0, len(table), _RUNS)]
        totals, end = np.concatenate(parts) if parts else np.empty((0, 2), np.uint64), 0
        for _, runs in asked:
            begin, end = end, end + len(runs)
            yield totals[begin:end].sum(0, dtype=np.uint64).tobytes()

    def _take(self, rows: list[tuple[int, int, int]]) -> Totals:
        """[runs, 2] totals of these runs: address, words, words before."""
        count = len(rows)
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._asked.numpy()[:count] = rows
            self._table.copy_(self._asked, non_blocking=True)
            add_words[(_PROGRAMS, count)](self._table, self._totals, BLOCK)
            self._answer.copy_(self._totals, non_blocking=True)
            self._event.record(self._stream)
            self._event.synchronize()
            totals: Totals = self._answer.numpy()[:count].view(np.uint64).sum(1, dtype=np.uint64)
            return totals
