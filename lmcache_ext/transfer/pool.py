"""The host pool: one anonymous shared-memory segment per rank, divided into slots.

A slot holds one chunk: `blocks_per_slot` rows, each the bytes of one block of all layers. The segment is a memfd: it is
not bounded by /dev/shm, other processes of the same user map it through /proc/<pid>/fd/<fd>, and nothing is left
behind when its last user ends, however that comes about.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lmcache_ext.errors import ConfigError


@dataclass(frozen=True)
class Shape:
    """How a pool is divided."""

    slots: int
    blocks_per_slot: int
    row_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of one chunk on this rank."""
        return self.blocks_per_slot * self.row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the segment."""
        return self.slots * self.slot_bytes

    @classmethod
    def fit(cls, nbytes: int, blocks_per_slot: int, row_bytes: int, setting: str) -> Shape:
        """As many whole slots as `nbytes` hold. Raises ConfigError if that is none."""
        slots = nbytes // (blocks_per_slot * row_bytes)
        if slots < 1:
            need = blocks_per_slot * row_bytes
            raise ConfigError(setting, nbytes / (1 << 30), f"holds no chunk: one takes {need / (1 << 30):.4f} GB here")
        return cls(slots, blocks_per_slot, row_bytes)


class HostPool:
    """A mapped segment. Memory is taken page by page as it is first touched."""

    def __init__(self, fd: int, shape: Shape) -> None:
        self.shape = shape
        self.fd = fd
        self._map = mmap.mmap(fd, shape.nbytes, flags=mmap.MAP_SHARED)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.address = int(ctypes.addressof(ctypes.c_char.from_buffer(self._map)))

    @classmethod
    def create(cls, shape: Shape, name: str) -> HostPool:
        """A new segment; `name` shows in /proc. Raises OSError if the kernel refuses it."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, shape.nbytes)
            return cls(fd, shape)
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, path: str, shape: Shape) -> HostPool:
        """Map another process' segment. Raises OSError if it is gone or is not what `shape` says."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != shape.nbytes:
                raise OSError(f"{path} has {os.fstat(fd).st_size} bytes, expected {shape.nbytes}")
            return cls(fd, shape)
        except OSError:
            os.close(fd)
            raise

    @property
    def path(self) -> str:
        """Where other processes of this user find the segment, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def row(self, index: int) -> npt.NDArray[np.uint8]:
        """[row_bytes] the bytes of one row, writable."""
        start = index * self.shape.row_bytes
        return self.bytes[start : start + self.shape.row_bytes]

    def close(self) -> None:
        """Drop the segment. The mapping itself goes with its last view."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
