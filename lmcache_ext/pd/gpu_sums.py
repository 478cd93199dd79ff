"""Sums of slots in a GPU's memory, taken there (`transfer.kernel.add_words`): 128 bits, against accidents."""

from __future__ import annotations

import threading

import torch

from lmcache_ext.pd.agent import Memory
from lmcache_ext.pd.parts import Runs
from lmcache_ext.transfer.kernel import BLOCK, WORD, add_words

_PROGRAMS = 64  # of one sum: half of a GPU, which has other things to do
_HIGH = -1  # a stream's priority: a sum is short, and somebody waits


class GpuSums:
    """Takes sums of `memory`'s slots, from any one thread at a time. Compiles its kernel when it is made."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._device = torch.device("cuda", memory.device_id)
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(priority=_HIGH)
            self._event = torch.cuda.Event(blocking=True)
            self._totals = torch.zeros(_PROGRAMS, 2, BLOCK, dtype=torch.int64, device=self._device)
            self._answer = torch.zeros(2, dtype=torch.int64, pin_memory=True)
            torch.cuda.current_stream().synchronize()
        self(0, ((0, WORD),))

    def __call__(self, slot: int, runs: Runs) -> bytes:
        """See `Sum`. Runs are whole words."""
        start, before = self._memory.address + slot * self._memory.slot_bytes, 0
        with self._lock, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            total: torch.Tensor | None = None
            for offset, nbytes in runs:
                add_words[(_PROGRAMS,)](start + offset, nbytes // WORD, before, self._totals, BLOCK)
                part = self._totals.sum((0, 2))
                total = part if total is None else total + part
                before += nbytes // WORD
            assert total is not None, "a sum of nothing"
            self._answer.copy_(total, non_blocking=True)
            self._event.record(self._stream)
            self._event.synchronize()
            return bytes(self._answer.numpy().tobytes())
