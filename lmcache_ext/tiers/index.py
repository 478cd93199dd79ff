"""What a tier holds, and who must leave for what comes: capacity is a bound at every moment.

    absent ──reserve──▶ WRITING ──commit──▶ READY ──leave, eviction──▶ LEAVING ──gone──▶ absent
                        WRITING ──abort───▶ absent

Bytes count from `reserve`, before the first is written, to `gone`, after the last was freed. A reservation may name
victims; its writer removes them before it writes. A victim whose removal failed stays LEAVING: nobody finds it, and its
bytes count until somebody manages to remove it.

Objects that a scan finds can be read at once; they can be evicted once the scan is over and `settle` put them in order.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_ext.policies import EvictionPolicy
from lmcache_ext.tiers.base import Outcome

_BATCH = 512  # keys settled between two chances for others to take the lock


class State(enum.Enum):
    """Where an object is in its life. Absent ones have no record."""

    WRITING = "writing"
    READY = "ready"
    LEAVING = "leaving"


class Entry:
    """One object."""

    __slots__ = ("doomed", "expires", "readers", "size", "state")

    def __init__(self, size: int, expires: float, state: State) -> None:
        self.size = size  # of the capacity
        self.expires = expires  # seconds since 1970; 0: never, or not known
        self.state = state
        self.readers = 0
        self.doomed = False  # WRITING: shall leave as soon as it is written


@dataclass
class Grant:
    """Room for one object, once `victims` are gone."""

    key: bytes
    victims: list[bytes]
    pledged: int  # bytes of the room that are still the victims'


class Index:
    """All objects of one tier. Thread-safe; no method does I/O or holds the lock for longer than some hundred keys.

    Args:
        policy: orders the keys that may be evicted.
        capacity: bytes; None: no bound.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int | None) -> None:
        self.capacity = capacity
        self._policy = policy
        self._lock = threading.Lock()
        self._entries: dict[bytes, Entry] = {}  # guarded by _lock, as all below
        self._used = 0
        self._pledged = 0  # of them, counted twice: for a victim and for what replaces it
        self._leaving = 0
        self._stuck: set[bytes] = set()  # LEAVING, their removal failed, and nobody is at it
        self._ready = 0
        self._unsettled: dict[bytes, float] | None = None  # key → time of last change, while a scan runs
        self._touched: list[bytes] = []  # in the meantime
        self.evicted = 0

    @property
    def used(self) -> int:
        """Bytes that are spoken for."""
        return self._used - self._pledged

    def __len__(self) -> int:
        """How many objects can be found."""
        return self._ready

    # -- looking ----------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes], now: float, touch: bool = False) -> list[Outcome | None]:
        """OK, MISS or EXPIRED for each key; None for one that is not known. `touch`: those that are OK were used."""
        with self._lock:
            verdicts = [self._judge(self._entries.get(key), now) for key in keys]
            if touch:
                for key, verdict in zip(keys, verdicts, strict=True):
                    if verdict is Outcome.OK:
                        self._touch(key)
            return verdicts

    def pin(self, key: bytes, now: float) -> Outcome | None:
        """As `find`; if OK, the object stays until `unpin`."""
        with self._lock:
            entry = self._entries.get(key)
            verdict = self._judge(entry, now)
            if entry is not None and verdict is Outcome.OK:
                entry.readers += 1
                self._touch(key)
            return verdict

    def unpin(self, key: bytes, expires: float | None = None) -> bool:
        """One reader less, who may have learnt when the object expires.

        True if the caller must now remove the object, and then say `gone`.
        """
        with self._lock:
            entry = self._entries[key]
            entry.readers -= 1
            if expires is not None:
                entry.expires = expires
            return entry.state is State.LEAVING and not entry.readers

    @staticmethod
    def _judge(entry: Entry | None, now: float) -> Outcome | None:
        if entry is None:
            return None
        if entry.state is not State.READY:
            return Outcome.MISS
        return Outcome.EXPIRED if 0 < entry.expires <= now else Outcome.OK

    # -- writing ----------------------------------------------------------------------------------------------------

    def reserve(self, key: bytes, size: int, expires: float, now: float) -> Grant | Outcome:
        """Room for `size` bytes under `key`, to be ended by `commit` or `abort`.

        Otherwise OK: it is there already; REFUSED: it is being written or deleted, or has expired and must be removed
        first; FULL: nobody can leave for it.
        """
        with self._lock:
            victims: list[bytes] = []
            if (known := self._entries.get(key)) is not None:
                if self._judge(known, now) is not Outcome.OK:
                    return Outcome.REFUSED
                self._touch(key)
                return Outcome.OK
            need = 0
            if self.capacity is not None:
                need = max(0, self.used + size - self.capacity)
                if size > self.capacity or (need and not self._choose(need, victims)):
                    return Outcome.FULL
            for victim in victims:
                self._leave(victim, self._entries[victim])
            self.evicted += len(victims)
            self._entries[key] = Entry(size, expires, State.WRITING)
            self._used += size
            self._pledged += need
            return Grant(key, victims, need)

    def _choose(self, need: int, victims: list[bytes]) -> bool:
        """Collect unread keys of `need` bytes, the best to leave first. False if there are not as many."""
        for key in self._policy.victims():
            entry = self._entries[key]
            if not entry.readers:
                victims.append(key)
                need -= entry.size
                if need <= 0:
                    return True
        return False

    def commit(self, key: bytes) -> bool:
        """The object is complete. True if it was deleted meanwhile: the caller removes it, and then says `gone`."""
        with self._lock:
            entry = self._entries[key]
            if entry.doomed:
                entry.state = State.LEAVING
                self._leaving += entry.size
                return True
            entry.state = State.READY
            self._enter(key, None)
            return False

    def abort(self, grant: Grant) -> None:
        """Nothing was written, or it was taken back. Victims that are not gone are `stuck`."""
        with self._lock:
            self._used -= self._entries.pop(grant.key).size
            self._pledged -= grant.pledged
            self._stuck.update(grant.victims)

    # -- leaving ----------------------------------------------------------------------------------------------------

    def leave(self, key: bytes) -> bool | None:
        """Nobody finds `key` from now on. None if it is not known.

        True if the caller must remove it now, and then say `gone`; False if somebody else will: its last reader, its
        writer, or who removes it already.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if entry.state is State.READY:
                self._leave(key, entry)
                return not entry.readers
            entry.doomed = True
            return False

    def _leave(self, key: bytes, entry: Entry) -> None:
        entry.state = State.LEAVING
        self._ready -= 1
        self._leaving += entry.size
        if self._unsettled is None or self._unsettled.pop(key, None) is None:
            self._policy.remove(key)

    def gone(self, key: bytes, grant: Grant | None = None) -> None:
        """The bytes of a leaving object are free, for `grant` if it was a victim of that."""
        with self._lock:
            size = self._entries.pop(key).size
            self._used -= size
            self._leaving -= size
            if grant is not None:
                grant.victims.remove(key)
                paid = min(size, grant.pledged)
                grant.pledged -= paid
                self._pledged -= paid

    def stay(self, key: bytes) -> None:
        """The removal of a leaving object failed: its bytes count until a later try succeeds."""
        with self._lock:
            self._stuck.add(key)

    def stuck(self) -> list[bytes]:
        """Keys whose removal failed."""
        with self._lock:
            return list(self._stuck)

    def claim_stuck(self) -> list[bytes]:
        """Keys whose removal failed; the caller tries again and says `gone` or `stay`."""
        with self._lock:
            keys = list(self._stuck)
            self._stuck.clear()
            return keys

    def surplus(self) -> list[bytes]:
        """Keys that must leave because more was found than may be there; the caller removes them, then `gone`."""
        with self._lock:
            victims: list[bytes] = []
            if self.capacity is None or (excess := self._used - self._leaving - self.capacity) <= 0:
                return victims
            self._choose(excess, victims)
            for key in victims:
                self._leave(key, self._entries[key])
            self.evicted += len(victims)
            return victims

    # -- finding out ------------------------------------------------------------------------------------------------

    def adopt(self, key: bytes, size: int, when: float, expires: float) -> bool:
        """An object was found. False if its key is known, in whatever state."""
        with self._lock:
            if key in self._entries:
                return False
            self._entries[key] = Entry(size, expires, State.READY)
            self._used += size
            self._enter(key, when)
            return True

    def _enter(self, key: bytes, when: float | None) -> None:
        self._ready += 1
        if when is not None and self._unsettled is not None:
            self._unsettled[key] = when
        else:
            self._policy.insert(key)

    def _touch(self, key: bytes) -> None:
        if self._unsettled is None or key not in self._unsettled:
            self._policy.touch(key)
        else:
            self._touched.append(key)

    def begin_scan(self) -> None:
        """What `adopt` gets from now on waits for `settle`."""
        with self._lock:
            self._unsettled = {} if self._unsettled is None else self._unsettled

    def settle(self) -> None:
        """The scan is over: what it found can be evicted, the oldest first; what was used meanwhile, last."""
        with self._lock:
            pending = list((self._unsettled or {}).items())
        pending.sort(key=lambda item: item[1])
        for start in range(0, len(pending), _BATCH):
            with self._lock:
                for key, _ in pending[start : start + _BATCH]:
                    if self._unsettled is not None and self._unsettled.pop(key, None) is not None:
                        self._policy.insert(key)
        with self._lock:
            for key in self._unsettled or {}:  # came while we sorted
                self._policy.insert(key)
            for key in self._touched:
                entry = self._entries.get(key)
                if entry is not None and entry.state is State.READY:
                    self._policy.touch(key)
            self._touched = []
            self._unsettled = None

    def knows(self, key: bytes) -> bool:
        """Whether there is a record of `key`, in whatever state."""
        return key in self._entries

    def ready(self) -> dict[bytes, int]:
        """Key → size of all objects that can be found. O(objects), for `check`."""
        with self._lock:
            return {key: entry.size for key, entry in self._entries.items() if entry.state is State.READY}

    def check(self) -> list[str]:
        """Every broken invariant. O(objects), under the lock: for tests, idle time and the CLI."""
        with self._lock:
            faults = []
            held = sum(entry.size for entry in self._entries.values())
            if held != self._used:
                faults.append(f"{self._used} bytes are counted and {held} are held")
            ready = {key for key, entry in self._entries.items() if entry.state is State.READY}
            if len(ready) != self._ready:
                faults.append(f"{self._ready} objects are counted and {len(ready)} are ready")
            waiting = set(self._unsettled or ())
            if set(self._policy.victims()) | waiting != ready:
                faults.append("the policy's keys are not the ready objects")
            leaving = sum(entry.size for entry in self._entries.values() if entry.state is State.LEAVING)
            if leaving != self._leaving or not 0 <= self._pledged <= leaving:
                faults.append(f"{self._leaving} bytes are leaving, {leaving} really, {self._pledged} of them pledged")
            return faults
