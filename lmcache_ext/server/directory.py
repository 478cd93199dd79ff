"""One directory for all groups: chunks of many sizes in one order of leaving.

Fairness is that order: whose chunk is first in it gives way, whichever group that is. Where the room must come from
another group, that group gives a whole extent, the one whose best chunk would have left first.
"""

from __future__ import annotations

import time
from collections.abc import Hashable

from lmcache_ext.engine import Chunk, Directory, Listener, State
from lmcache_ext.policies import EvictionPolicy
from lmcache_ext.server.memory import Arena, Extent, Group, Stake

_SHARE_PART, _SHARE_CHUNKS = 16, 64  # a salt at its bound gives up a 16th of it at once, or 64 chunks if that is less
_CHEAP, _REST = 0.001, 10  # seconds that a search may take as often as one likes; rests, in times of what it took


class Vain:
    """Searches for room that found none. Each goes over all chunks, and the one thread that does it serves everybody:
    nothing is searched for on the same behalf again for ten times as long as it took.
    """

    def __init__(self) -> None:
        self._until: dict[Hashable, float] = {}  # monotonic

    def lately(self, who: Hashable) -> bool:
        """Whether to find nothing at once."""
        if self._until.get(who, 0.0) > time.monotonic():
            return True
        self._until.pop(who, None)
        return False

    def add(self, who: Hashable, began: float) -> None:
        """Nothing was found. `began`: as `time.thread_time` says it."""
        now, took = time.monotonic(), time.thread_time() - began
        if took > _CHEAP:
            self._until = {each: until for each, until in self._until.items() if until > now}
            self._until[who] = now + _REST * took


class SharedDirectory(Directory):
    """`Directory` over an `Arena`. A chunk's `note` is its `Stake`, its `slot` an offset. Keys of all groups are one
    space: they are digests that begin with their group's root.
    """

    def __init__(self, policy: EvictionPolicy, arena: Arena, listener: Listener | None = None) -> None:
        super().__init__(policy, listener, slots=arena)
        self.arena = arena
        self._limits: dict[bytes, int] = {}  # bytes by salt
        self._vain = Vain()

    # -- writing ----------------------------------------------------------------------------------------------------

    def _room(self, note: object) -> int | None:
        """As the base's, with a `Stake` as note. None also if the salt's share is used up: see `over`."""
        assert isinstance(note, Stake)
        return self._room_for(note) if self._within_share(note) else None

    def _room_for(self, stake: Stake) -> int | None:
        slot = self.arena.take(stake)
        if slot is not None or self._vain.lately(stake.group):
            return slot
        began = time.thread_time()
        slot = self._seek(stake)
        if slot is None:
            self._vain.add(stake.group, began)
        return slot

    def _seek(self, stake: Stake) -> int | None:
        """A slot that something else leaves. O(chunks) where most are held, or another group's extent is taken."""
        asked: set[Group] = set()
        for key in self._policy.victims():
            chunk = self._chunks[key]
            group = group_of(chunk)
            if chunk.leases or group in asked:
                continue
            if group is stake.group:
                self._push_out([chunk])
                return self.arena.take(stake)
            asked.add(group)
            if chunks := self._coldest_extent(group):
                self._push_out(chunks)
                return self.arena.take(stake)
        return None

    def _coldest_extent(self, group: Group) -> list[Chunk]:
        """All chunks of the extent whose best chunk leaves first, among extents of which nothing is held. O(chunks)."""
        inside: dict[Extent, list[Chunk]] = {}
        last: dict[Extent, int] = {}
        for rank, key in enumerate(self._policy.victims()):
            chunk = self._chunks[key]
            if group_of(chunk) is group and not chunk.leases:
                extent = self.arena.extent_of(chunk.slot)
                inside.setdefault(extent, []).append(chunk)
                last[extent] = rank
        whole = [extent for extent, chunks in inside.items() if len(chunks) == extent.used]
        return inside[min(whole, key=last.__getitem__)] if whole else []

    def _push_out(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._leave(chunk)
        self.evicted += len(chunks)

    def forget(self, group: Group | None) -> int:
        """Forget a group's chunks, or all, also what is being written. Returns how many were ready."""
        chunks = [chunk for chunk in self._chunks.values() if group is None or group_of(chunk) is group]
        ready = sum(chunk.state is State.READY for chunk in chunks)
        for chunk in chunks:
            self._leave(chunk)
        return ready

    # -- shares of salts --------------------------------------------------------------------------------------------

    @property
    def limits(self) -> dict[bytes, int]:
        """Bytes that each salt may take; those without a bound are missing."""
        return dict(self._limits)

    def limit(self, salt: bytes, nbytes: int | None) -> None:
        """Bound a salt's bytes, or no longer. What is beyond it and not held leaves at once."""
        if nbytes is None:
            self._limits.pop(salt, None)
        else:
            self._limits[salt] = nbytes
            self._shrink(salt, nbytes)

    def over(self, stake: Stake) -> bool:
        """Whether one more chunk would be more than its salt may have."""
        limit = self._limits.get(stake.salt)
        return limit is not None and self.arena.by_salt.get(stake.salt, 0) + stake.group.slot_bytes > limit

    def _within_share(self, stake: Stake) -> bool:
        if self.over(stake) and not self._vain.lately(stake.salt):
            began, limit, slot = time.thread_time(), self._limits[stake.salt], stake.group.slot_bytes
            self._shrink(stake.salt, limit - max(slot, min(limit // _SHARE_PART, _SHARE_CHUNKS * slot)))
            if self.over(stake):
                self._vain.add(stake.salt, began)
        return not self.over(stake)

    def _shrink(self, salt: bytes, nbytes: int) -> None:
        """Let the salt's chunks that leave first go until it has `nbytes`, or all that nobody holds. O(chunks)."""
        excess = self.arena.by_salt.get(salt, 0) - nbytes
        if excess <= 0 or nbytes < 0:
            return
        chosen = []
        for key in self._policy.victims():
            chunk = self._chunks[key]
            stake = self.arena.stake(chunk.slot)
            if stake.salt == salt and not chunk.leases:
                chosen.append(chunk)
                excess -= stake.group.slot_bytes
                if excess <= 0:
                    break
        self._push_out(chosen)

    # -- proving ----------------------------------------------------------------------------------------------------

    def check(self, fix: bool = False) -> list[str]:
        """As the base's, the arena's invariants and the shares included."""
        faults = super().check(fix) + self.arena.check()
        for salt, limit in self._limits.items():
            held = self.arena.by_salt.get(salt, 0)
            loose = [c for c in self.chunks() if not c.leases and self.arena.stake(c.slot).salt == salt]
            if held > limit and loose:
                faults.append(f"salt {salt.hex()} has {held} bytes and may have {limit}")
        return faults


def group_of(chunk: Chunk) -> Group:
    """The group of a chunk."""
    assert isinstance(chunk.note, Stake)
    return chunk.note.group
