"""What a tier holds, and who must leave for what comes: capacity is a bound at every moment.

    absent ──reserve──▶ WRITING ──commit──▶ READY ──leave, eviction──▶ LEAVING ──gone──▶ absent
                        WRITING ──abort───▶ absent

Bytes count from `reserve`, before the first is written, to `gone`, after the last was freed. A reservation may name
victims; its writer removes them before it writes. A victim whose removal failed stays LEAVING: nobody finds it, and its
bytes count until somebody manages to remove it.

Objects that a scan finds can be read at once; they can be evicted once the scan is over and `settle` put them in order.

An index that does not keep forgets an object as soon as it is written: for media that are asked about everything.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmcache_ext.policies import EvictionPolicy
from lmcache_ext.tiers.base import Outcome

_BATCH = 512  # keys settled in one go
_MOST_LEFT = 1 << 16
_PAUSE = 0.0005  # seconds; without, whoever waits for the lock starves


class State(enum.Enum):
    """What an object is if it is neither ready nor absent."""

    WRITING = "writing"
    LEAVING = "leaving"


@dataclass
class Grant:
    """Room for one object, once `victims` are gone."""

    key: bytes
    victims: list[bytes]
    pledged: int  # bytes of the room that are still the victims'


class Index:
    """All objects of one tier. Thread-safe; no method does I/O, and only `check` holds the lock for long.

    Args:
        policy: orders the keys that may be evicted.
        capacity: bytes; None: no bound.
        keeps: whether it remembers what is READY; if not, only what is being written or removed here.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int | None, keeps: bool = True) -> None:
        self.capacity = capacity
        self.keeps = keeps
        self._policy = policy
        self._lock = threading.Lock()
        # Guarded by _lock, as all below. Plain numbers by key, not an object for each: a million of those, and every
        # full run of Python's garbage collector holds up the whole process for a tenth of a second and more.
        self._sizes: dict[bytes, int] = {}  # bytes of the capacity, in whatever state
        self._states: dict[bytes, State] = {}  # of those that are not ready
        self._expires: dict[bytes, float] = {}  # seconds since 1970, where it is known
        self._readers: dict[bytes, int] = {}  # more than none
        self._doomed: set[bytes] = set()  # WRITING, shall leave as soon as they are written
        self._used = 0
        self._pledged = 0  # of them, counted twice: for a victim and for what replaces it
        self._leaving = 0
        self._stuck: set[bytes] = set()  # LEAVING, their removal failed, and nobody is at it
        self._ready = 0
        self._unsettled: dict[bytes, float] | None = None  # key → time of last change, while a scan runs
        self._touched: dict[bytes, None] = {}  # of what is ready, in the meantime; the last used last
        self._left: deque[bytes] = deque(maxlen=_MOST_LEFT)  # went since `take_left`, and may be back
        self._went = 0  # so many
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
            verdicts = [self._judge(key, now) for key in keys]
            if touch:
                for key, verdict in zip(keys, verdicts, strict=True):
                    if verdict is Outcome.OK:
                        self._touch(key)
            return verdicts

    def pin(self, key: bytes, now: float) -> Outcome | None:
        """As `find`; if OK, the object stays until `unpin`."""
        with self._lock:
            verdict = self._judge(key, now)
            if verdict is Outcome.OK:
                self._readers[key] = self._readers.get(key, 0) + 1
                self._touch(key)
            return verdict

    def unpin(self, key: bytes, expires: float | None = None) -> bool:
        """One reader less, who may have learnt when the object expires.

        True if the caller must now remove the object, and then say `gone`.
        """
        with self._lock:
            if expires:
                self._expires[key] = expires
            readers = self._readers.pop(key) - 1
            if readers:
                self._readers[key] = readers
            return self._states.get(key) is State.LEAVING and not readers

    def _judge(self, key: bytes, now: float) -> Outcome | None:
        if key not in self._sizes:
            return None
        if key in self._states:
            return Outcome.MISS
        return Outcome.EXPIRED if now >= self._expires.get(key, now + 1) else Outcome.OK

    # -- writing ----------------------------------------------------------------------------------------------------

    def reserve(self, key: bytes, size: int, expires: float, now: float) -> Grant | Outcome:
        """Room for `size` bytes under `key`, to be ended by `commit` or `abort`.

        Otherwise OK: it is there already; REFUSED: it is being written or deleted, or has expired and must be removed
        first; FULL: nobody can leave for it.
        """
        with self._lock:
            victims: list[bytes] = []
            if (known := self._judge(key, now)) is Outcome.OK:
                self._touch(key)
                return Outcome.OK
            if known is not None:
                return Outcome.REFUSED
            need = 0
            if self.capacity is not None:
                need = max(0, self.used + size - self.capacity)
                if size > self.capacity or (need and not self._choose(need, victims)):
                    return Outcome.FULL
            for victim in victims:
                self._leave(victim)
            self.evicted += len(victims)
            self._states[key] = State.WRITING
            self._record(key, size, expires)
            self._pledged += need
            return Grant(key, victims, need)

    def _record(self, key: bytes, size: int, expires: float) -> None:
        self._sizes[key] = size
        self._used += size
        if expires:
            self._expires[key] = expires

    def _erase(self, key: bytes) -> int:
        size = self._sizes.pop(key)
        self._used -= size
        self._states.pop(key, None)
        self._expires.pop(key, None)
        self._doomed.discard(key)
        return size

    def _choose(self, need: int, victims: list[bytes]) -> bool:
        """Collect unread keys of `need` bytes, the best to leave first. False if there are not as many."""
        for key in self._policy.victims():
            if key not in self._readers:
                victims.append(key)
                need -= self._sizes[key]
                if need <= 0:
                    return True
        return False

    def commit(self, key: bytes) -> bool:
        """The object is complete. True if it was deleted meanwhile: the caller removes it, and then says `gone`."""
        with self._lock:
            if key in self._doomed:
                self._states[key] = State.LEAVING
                self._leaving += self._sizes[key]
                return True
            if not self.keeps:
                self._erase(key)
                return False
            del self._states[key]
            self._enter(key, None)
            return False

    def abort(self, grant: Grant) -> None:
        """Nothing was written, or it was taken back. Victims that are not gone are `stuck`."""
        with self._lock:
            self._erase(grant.key)
            self._pledged -= grant.pledged
            self._stuck.update(grant.victims)

    # -- leaving ----------------------------------------------------------------------------------------------------

    def leave(self, key: bytes) -> bool | None:
        """Nobody finds `key` from now on. None if it is not known.

        True if the caller must remove it now, and then say `gone`; False if somebody else will: its last reader, its
        writer, or who removes it already.
        """
        with self._lock:
            if key not in self._sizes:
                return None
            if key not in self._states:
                self._leave(key)
                return key not in self._readers
            if self._states[key] is State.WRITING:
                self._doomed.add(key)
            return False

    def _leave(self, key: bytes) -> None:
        self._states[key] = State.LEAVING
        self._left.append(key)
        self._went += 1
        self._ready -= 1
        self._leaving += self._sizes[key]
        self._touched.pop(key, None)
        if self._unsettled is None or self._unsettled.pop(key, None) is None:
            self._policy.remove(key)

    def gone(self, key: bytes, grant: Grant | None = None) -> None:
        """The bytes of a leaving object are free, for `grant` if it was a victim of that."""
        with self._lock:
            size = self._erase(key)
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
                self._leave(key)
            self.evicted += len(victims)
            return victims

    # -- finding out ------------------------------------------------------------------------------------------------

    def adopt(self, key: bytes, size: int, when: float, expires: float) -> bool:
        """An object was found. False if its key is known, in whatever state, or will not be."""
        with self._lock:
            if key in self._sizes or not self.keeps:
                return False
            self._record(key, size, expires)
            self._enter(key, when)
            return True

    def _enter(self, key: bytes, when: float | None) -> None:
        self._ready += 1
        if when is not None and self._unsettled is not None:
            self._unsettled[key] = when
        else:
            self._insert(key)

    def _insert(self, key: bytes) -> None:
        """Policies take the first touch for the writer's own; here only later requests touch."""
        self._policy.insert(key)
        self._policy.touch(key)

    def _touch(self, key: bytes) -> None:
        if self._unsettled is None or key not in self._unsettled:
            self._policy.touch(key)
        else:
            self._touched.pop(key, None)  # else it keeps its place
            self._touched[key] = None

    def begin_scan(self) -> None:
        """What `adopt` gets from now on waits for `settle`."""
        with self._lock:
            self._unsettled = {} if self._unsettled is None else self._unsettled

    def settle(self) -> None:
        """The scan is over: what it found can be evicted, the oldest first; what was used meanwhile, last.

        Takes about 3 s for a million, with pauses.
        """
        with self._lock:
            keys, times = list(self._unsettled or ()), list((self._unsettled or {}).values())
        when = np.empty(len(keys))
        for start in range(0, len(keys), _BATCH):
            when[start : start + _BATCH] = times[start : start + _BATCH]
        order = np.argsort(when, kind="stable")  # without the GIL, which a sort of a million objects holds for 0.3 s
        for start in range(0, len(keys), _BATCH):
            time.sleep(_PAUSE)
            with self._lock:
                for i in order[start : start + _BATCH].tolist():
                    if self._unsettled is not None and self._unsettled.pop(keys[i], None) is not None:
                        self._insert(keys[i])
        with self._lock:
            for key in self._unsettled or {}:  # came while we sorted
                self._insert(key)
            for key in self._touched:
                self._policy.touch(key)
            self._touched = {}
            self._unsettled = None

    def take_left(self) -> tuple[list[bytes], bool]:
        """Keys that went since the last call and are not ready again; whether there were more than are remembered."""
        if not self._went:
            return [], False
        with self._lock:
            left, more = [key for key in self._left if not self.is_ready(key)], self._went > len(self._left)
            self._left.clear()
            self._went = 0
        return left, more

    def is_ready(self, key: bytes) -> bool:
        """Whether it can be found."""
        return key in self._sizes and key not in self._states

    def knows(self, key: bytes) -> bool:
        """Whether there is a record of `key`, in whatever state."""
        return key in self._sizes

    def ready(self) -> dict[bytes, int]:
        """Key → size of all objects that can be found. O(objects), for `check`."""
        with self._lock:
            return {key: size for key, size in self._sizes.items() if key not in self._states}

    def check(self) -> list[str]:
        """Every broken invariant. O(objects), under the lock: for tests, idle time and the CLI."""
        with self._lock:
            faults = []
            held = sum(self._sizes.values())
            if held != self._used:
                faults.append(f"{self._used} bytes are counted and {held} are held")
            ready = self._sizes.keys() - self._states.keys()
            if len(ready) != self._ready:
                faults.append(f"{self._ready} objects are counted and {len(ready)} are ready")
            if set(self._policy.victims()) | set(self._unsettled or ()) != ready:
                faults.append("the policy's keys are not the ready objects")
            left = [key for key, state in self._states.items() if state is State.LEAVING]
            leaving = sum(self._sizes[key] for key in left)
            if leaving != self._leaving or not 0 <= self._pledged <= leaving:
                faults.append(f"{self._leaving} bytes are leaving, {leaving} really, {self._pledged} of them pledged")
            notes = self._states.keys() | self._expires.keys() | self._readers.keys() | self._doomed | self._stuck
            if notes - self._sizes.keys() or self._stuck - set(left) or self._touched.keys() - ready:
                faults.append("something is noted about objects that there are not")
            return faults
