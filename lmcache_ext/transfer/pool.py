"""The pool of one rank, divided into slots: an anonymous shared-memory segment, or for hand-overs memory of its GPU.

A slot holds one chunk: `blocks_per_slot` rows, each the bytes of one block of all layers. Behind the slots comes a page
of words, one for each rank that maps the segment: how many slots that rank can copy to and from by now; the page's last
word says whether the engine has started. The segment is
a memfd: it is not bounded by /dev/shm, other processes of the same user map it through /proc/<pid>/fd/<fd>, and nothing
is left behind when its last user ends, however that comes about.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lmcache_ext.errors import ConfigError

_SERVING = -1  # the word that the scheduler writes


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
        """Bytes of the slots."""
        return self.slots * self.slot_bytes

    @property
    def words_at(self) -> int:
        """Where the page of words begins."""
        return -(-self.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def segment_bytes(self) -> int:
        """Bytes of the segment."""
        return self.words_at + mmap.PAGESIZE

    @classmethod
    def fit(cls, nbytes: int, blocks_per_slot: int, row_bytes: int, setting: str) -> Shape:
        """As many whole slots as `nbytes` hold. Raises ConfigError if that is none."""
        slots = nbytes // (blocks_per_slot * row_bytes)
        if slots < 1:
            need = blocks_per_slot * row_bytes
            raise ConfigError(setting, nbytes / (1 << 30), f"holds no chunk: one takes {need / (1 << 30):.4f} GB here")
        return cls(slots, blocks_per_slot, row_bytes)


class Pool(Protocol):
    """Memory that a data plane copies to and from: the host's, or a GPU's."""

    address: int
    on_gpu: bool
    row_bytes: int
    grown: int  # how many of the grain's slots, from the first, this rank can copy to and from by now

    @property
    def grain(self) -> Shape:
        """What it grows by: no row lies in two of these slots, which begin at the pool's first byte."""

    def at(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[n] where each of these rows begins, in bytes from the pool's first."""

    @property
    def maker(self) -> bool:
        """Whether this rank made the pool, and takes its memory."""

    @property
    def made(self) -> int:
        """How many slots the maker can use by now."""

    @property
    def serving(self) -> bool:
        """Whether the engine has started, see `Growth.serve`."""

    def close(self) -> None:
        """Drop it. The mapping itself goes with its last view."""


class _Own:
    """What pools that an engine's ranks make have in common: the segment, whose words say how far they are. `member` is
    the word that is ours to write: 0 for the rank that made the pool."""

    on_gpu = False

    def __init__(self, fd: int, shape: Shape, member: int, words: mmap.mmap, at: int) -> None:
        self.shape = self.grain = shape
        self.row_bytes = shape.row_bytes
        self.fd = fd
        self._words = np.frombuffer(words, dtype=np.int64, offset=at)
        self._member = member

    @property
    def grown(self) -> int:
        """How many slots, from the first, this rank can copy to and from by now."""
        return int(self._words[self._member])

    @grown.setter
    def grown(self, slots: int) -> None:
        self._words[self._member] = slots

    @property
    def maker(self) -> bool:
        """Whether this rank made the pool."""
        return self._member == 0

    @property
    def made(self) -> int:
        """How many slots the rank that made the pool can use by now."""
        return int(self._words[0])

    @property
    def serving(self) -> bool:
        """Whether the engine has started, see `Growth.serve`."""
        return bool(self._words[_SERVING])

    @property
    def path(self) -> str:
        """Where other processes of this user find the segment, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def at(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[n] where each of these rows begins, in bytes."""
        return rows * self.row_bytes

    def close(self) -> None:
        """Drop the segment. A mapping itself goes with its last view."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class HostPool(_Own):
    """A mapped segment."""

    def __init__(self, fd: int, shape: Shape, member: int = 0) -> None:
        self._map = mmap.mmap(fd, shape.segment_bytes, flags=mmap.MAP_SHARED)
        super().__init__(fd, shape, member, self._map, shape.words_at)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8, count=shape.nbytes)
        self.address = int(ctypes.addressof(ctypes.c_char.from_buffer(self._map)))

    @classmethod
    def create(cls, shape: Shape, name: str) -> HostPool:
        """A new segment; `name` shows in /proc. Raises OSError if the kernel refuses it."""
        fd = _segment(shape, name)
        try:
            return cls(fd, shape)
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, path: str, shape: Shape, member: int) -> HostPool:
        """Map another process' segment. Raises OSError if it is gone or is not what `shape` says."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _require_size(fd, path, shape)
            return cls(fd, shape, member)
        except OSError:
            os.close(fd)
            raise

    def row(self, index: int) -> npt.NDArray[np.uint8]:
        """[row_bytes] the bytes of one row, writable."""
        start = index * self.shape.row_bytes
        return self.bytes[start : start + self.shape.row_bytes]

    def part(self, slot: int, blocks: int) -> memoryview:
        """The bytes of a slot's first `blocks` rows, writable."""
        start = slot * self.shape.slot_bytes
        return memoryview(self._map)[start : start + blocks * self.shape.row_bytes]


class GpuPool(_Own):
    """Slots in memory of a GPU, which this process has and no other maps. Of its segment only the words are used; all
    else of it is a hole that takes no memory.

    Args:
        address: of the memory, `shape.nbytes` of it. It is never given back: peers may know it.
        device: its number in this process.
    """

    on_gpu = True

    def __init__(self, shape: Shape, name: str, address: int, device: int) -> None:
        fd = _segment(shape, name)
        try:
            words = mmap.mmap(fd, mmap.PAGESIZE, offset=shape.words_at)
        except OSError:
            os.close(fd)
            raise
        super().__init__(fd, shape, 0, words, 0)
        self.address, self.device = address, device


class Growth:
    """Reads how far a pool has grown, and says when the engine has started, from any process of its user.

    Args:
        path: of the pool.
        shape: of the pool.
        members: how many ranks map it.

    Raises:
        OSError: the pool is gone or is not what `shape` says.
    """

    def __init__(self, path: str, shape: Shape, members: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _require_size(fd, path, shape)
            self._map = mmap.mmap(fd, mmap.PAGESIZE, offset=shape.words_at)
        finally:
            os.close(fd)
        self._words = np.frombuffer(self._map, dtype=np.int64)
        self._members = members

    def serve(self) -> None:
        """The engine has started: from now on the pool grows to its full size."""
        self._words[_SERVING] = 1

    def slots(self) -> int:
        """Slots that every one of the ranks can use by now. About 3 µs."""
        return int(self._words[: self._members].min())


def _segment(shape: Shape, name: str) -> int:
    """A new one, of `segment_bytes`."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, shape.segment_bytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _require_size(fd: int, path: str, shape: Shape) -> None:
    size = os.fstat(fd).st_size
    if size != shape.segment_bytes:
        raise OSError(f"{path} has {size} bytes, expected {shape.segment_bytes}")
