"""A cache server's segment, as one rank of an engine copies to and from it.

The server gives out slots of any size at any memory page. A row is named as in an engine's own pool, slot times rows of
a slot plus the row within it, where a slot's number is the memory page that it begins at.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmcache_ext.transfer.pool import Shape

PAGE = 4096
"""Slots begin at multiples of it; so many bytes are one slot number."""


@dataclass(frozen=True)
class Segment:
    """What a worker must know of it. `starts`: where each writing rank's part of a slot begins."""

    path: str
    nbytes: int
    extent_bytes: int  # a slot lies in one extent
    starts: tuple[int, ...]
    blocks_per_slot: int


class SegmentPool:
    """The whole segment, mapped. `part`: which of a slot's parts is ours.

    Raises:
        OSError: it is gone, or has another size.
    """

    maker = False  # the server takes the memory
    on_gpu = False
    serving = True

    def __init__(self, segment: Segment, part: int, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self.grain = Shape(segment.nbytes // segment.extent_bytes, 1, segment.extent_bytes)
        self.made = self.grain.slots
        self.grown = 0
        self._start = segment.starts[part]
        self._blocks = segment.blocks_per_slot
        fd = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size != segment.nbytes:
                raise OSError(f"{segment.path} has {size} bytes, expected {segment.nbytes}")
            self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        finally:
            os.close(fd)
        self.address = int(ctypes.addressof(ctypes.c_char.from_buffer(self._map)))

    @property
    def whole(self) -> bool:
        """Whether all of it can be used by now."""
        return self.grown >= self.grain.slots

    def at(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[n] where each of these rows begins, in bytes."""
        first = rows // self._blocks * PAGE + self._start
        return first + rows % self._blocks * self.row_bytes

    def close(self) -> None:
        """The mapping goes with its last view."""
