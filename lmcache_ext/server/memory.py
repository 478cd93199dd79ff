"""The server's memory: one segment, divided into extents that groups get on demand and give back when they are empty.

A group is one namespace; its chunks all have one size. A slot holds one chunk, every rank's part behind the one before,
each on a memory page of its own so that files can be read straight into it. A slot is named by its offset in the
segment. What an extent has behind its last whole slot is not used.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmcache_ext.engine.slots import Slots
from lmcache_ext.tiers import Parts

_PAGE = mmap.PAGESIZE
_PIECE = 256 << 20  # bytes that are populated at once
MIB, GIB = 1 << 20, 1 << 30


class Segment:
    """An anonymous shared-memory segment (memfd). Others of this user map it through `path`.

    Raises:
        OSError: the kernel refuses it.
    """

    def __init__(self, nbytes: int, name: str) -> None:
        self.nbytes = nbytes
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, nbytes)
            self._map = mmap.mmap(self.fd, nbytes, flags=mmap.MAP_SHARED)
        except OSError:
            os.close(self.fd)
            raise
        self.populated = 0

    @property
    def path(self) -> str:
        """Where it can be opened, as long as this process lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Bytes of it, writable."""
        return memoryview(self._map)[offset : offset + nbytes]

    def populate(self) -> bool:
        """Have the kernel give one more piece of the memory. False: it is all there. Lets go of the GIL.

        Raises:
            OSError: there is not so much.
        """
        if self.populated < self.nbytes:
            piece = min(_PIECE, self.nbytes - self.populated)
            os.posix_fallocate(self.fd, self.populated, piece)
            self.populated += piece
        return self.populated < self.nbytes

    @property
    def resident(self) -> int:
        """Bytes that were ever touched."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """The memory goes with the last mapping, here or elsewhere."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(eq=False)
class Extent:
    """One piece of the segment."""

    number: int
    group: Group | None = None
    free: list[int] = field(default_factory=list)  # offsets, the lowest last
    used: int = 0


@dataclass(eq=False)
class Group:
    """One namespace, and the memory that it has."""

    number: int
    root: bytes
    model: str
    parts: tuple[int, ...]  # bytes for each rank
    tokens: int
    extents: list[Extent] = field(default_factory=list)
    used: int = 0  # slots

    def __post_init__(self) -> None:
        at, starts = 0, []
        for nbytes in self.parts:
            starts.append(at)
            at += -(-nbytes // _PAGE) * _PAGE
        self.starts = tuple(starts)
        self.slot_bytes = at


@dataclass(frozen=True)
class Stake:
    """Whose a chunk is: what the directory keeps beside it."""

    group: Group
    salt: bytes = b""


def extent_for(nbytes: int) -> int:
    """Bytes of an extent for a segment of so many: a 64th of it, but 256 MiB or an eighth where that is more."""
    extent = max(nbytes // 64, min(nbytes // 8, 256 * MIB))
    return max(extent // _PAGE * _PAGE, _PAGE)


class Arena(Slots):
    """Slots of many sizes. One thread, never blocks. `take` and `give` cost O(extents of the group)."""

    def __init__(self, nbytes: int, extent: int) -> None:
        super().__init__()
        self.extent_bytes = extent
        self.extents = [Extent(i) for i in range(nbytes // extent)]
        self._spare = self.extents[::-1]
        self._stakes: dict[int, Stake] = {}  # by offset, of all slots in use
        self.by_salt: dict[bytes, int] = {}  # bytes

    @property
    def spare(self) -> int:
        """Extents that nobody has."""
        return len(self._spare)

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots in use."""
        return sum(self.by_salt.values())

    @property
    def capacity(self) -> int:
        """About how many chunks there is room for: the groups' extents, and the rest in chunks of mean size."""
        owned = [extent for extent in self.extents if extent.group]
        slots = sum(extent.used + len(extent.free) for extent in owned)
        return slots + self.spare * (max(1, slots // len(owned)) if owned else 1)

    @capacity.setter
    def capacity(self, value: int) -> None:
        """The base class sets 0 at first."""

    @property
    def free(self) -> int:
        return self.capacity - len(self._stakes)

    def grow(self, capacity: int) -> None:
        """The segment does not grow."""

    def extent_of(self, offset: int) -> Extent:
        """The extent that a slot lies in."""
        return self.extents[offset // self.extent_bytes]

    def take(self, stake: Stake | None = None) -> int | None:
        """A slot for a chunk of `stake`, from the group's own extents or a new one; None: nobody has one to give."""
        assert stake is not None
        group = stake.group
        extent = next((each for each in group.extents if each.free), None) or self._give_extent(group)
        if extent is None:
            return None
        offset = extent.free.pop()
        extent.used += 1
        group.used += 1
        self._stakes[offset] = stake
        self.by_salt[stake.salt] = self.by_salt.get(stake.salt, 0) + group.slot_bytes
        return offset

    def _give_extent(self, group: Group) -> Extent | None:
        if not self._spare:
            return None
        extent = self._spare.pop()
        start, size = extent.number * self.extent_bytes, group.slot_bytes
        extent.group = group
        extent.free = [start + i * size for i in reversed(range(self.extent_bytes // size))]
        group.extents.append(extent)
        return extent

    def give(self, slot: int) -> None:
        """Nobody reads or writes it any more."""
        stake, extent = self._stakes.pop(slot), self.extent_of(slot)
        group = stake.group
        left = self.by_salt[stake.salt] - group.slot_bytes
        if left:
            self.by_salt[stake.salt] = left
        else:
            del self.by_salt[stake.salt]
        group.used -= 1
        extent.used -= 1
        extent.free.append(slot)
        if not extent.used:
            group.extents.remove(extent)
            extent.group, extent.free = None, []
            self._spare.append(extent)

    def taken(self) -> set[int]:
        return set(self._stakes)

    def stake(self, offset: int) -> Stake:
        """Whose the chunk in a slot in use is."""
        return self._stakes[offset]

    def check(self) -> list[str]:
        """Every broken invariant, as a sentence. O(slots)."""
        faults = []
        by_extent: dict[int, list[int]] = {}
        for offset in self._stakes:
            by_extent.setdefault(self.extent_of(offset).number, []).append(offset)
        for extent in self.extents:
            inside = by_extent.get(extent.number, [])
            if len(inside) != extent.used or (extent.group is None) != (not inside):
                faults.append(f"extent {extent.number} counts {extent.used} slots and has {len(inside)}")
            if any(self._stakes[o].group is not extent.group for o in inside):
                faults.append(f"extent {extent.number} has slots of another group")
            if len(set(inside) & set(extent.free)) or len(set(extent.free)) != len(extent.free):
                faults.append(f"extent {extent.number} has a slot twice")
        owned = [extent for extent in self.extents if extent.group]
        if len(owned) + len(self._spare) != len(self.extents):
            faults.append(f"{len(owned)} extents are owned, {len(self._spare)} spare, of {len(self.extents)}")
        used = sum(stake.group.slot_bytes for stake in self._stakes.values())
        if used != self.used_bytes:
            faults.append(f"{used} bytes are in use and {self.used_bytes} are counted")
        return faults


def parts_of(segment: Segment, stake: Stake, offset: int, tokens: int) -> Parts:
    """The memory of a chunk of so many tokens, one part for each rank."""
    group = stake.group
    return [
        segment.view(offset + start, nbytes * min(tokens, group.tokens) // group.tokens)
        for start, nbytes in zip(group.starts, group.parts, strict=True)
    ]


def whole(parts: Sequence[memoryview]) -> int:
    """Bytes of all parts."""
    return sum(part.nbytes for part in parts)
