"""A directory that two threads share: the scheduler's, and the one that takes chunks from prefill engines."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from lmcache_ext.engine.directory import Chunk, Directory, Listener, Outcome
from lmcache_ext.policies import EvictionPolicy

_LONGEST_WAIT = 0.25  # seconds; whoever holds the lock does so for one call, or for one turn of the scheduler


class LockedDirectory(Directory):
    """A `Directory` each of whose methods may be called from any thread.

    What one thread has found may be gone with its next call, except within a turn: from `begin_turn` to `end_turn`
    other threads wait, so that what the scheduler promises is there when it comes to lease it. One thread takes turns.
    """

    def __init__(self, policy: EvictionPolicy, listener: Listener | None = None) -> None:
        super().__init__(policy, listener)
        self.lock = threading.RLock()
        self._turn = False  # the turn-taking thread's

    def begin_turn(self) -> None:
        """Others wait from now on. If the lock can't be had in a quarter of a second, a promise may break."""
        self._turn = self._turn or self.lock.acquire(timeout=_LONGEST_WAIT)

    def end_turn(self) -> None:
        """The turn, if there is one, is over."""
        if self._turn:
            self._turn = False
            self.lock.release()

    def match(self, keys: Sequence[bytes]) -> int:
        with self.lock:
            return super().match(keys)

    def ready(self, key: bytes) -> Chunk | None:
        with self.lock:
            return super().ready(key)

    def coming(self, key: bytes) -> bool:
        with self.lock:
            return super().coming(key)

    def touch(self, keys: Iterable[bytes]) -> None:
        with self.lock:
            super().touch(keys)

    def chunks(self) -> list[Chunk]:
        with self.lock:
            return super().chunks()

    def __len__(self) -> int:
        with self.lock:
            return super().__len__()

    @property
    def used(self) -> int:
        """Slots that hold or await bytes."""
        with self.lock:
            return super().used

    def lease(self, keys: Sequence[bytes]) -> list[Chunk] | None:
        with self.lock:
            return super().lease(keys)

    def hold(self, chunk: Chunk) -> bool:
        with self.lock:
            return super().hold(chunk)

    def release(self, chunks: Iterable[Chunk]) -> None:
        with self.lock:
            super().release(chunks)

    def prepare_store(self, key: bytes, tokens: int, note: object = None) -> Chunk | Outcome:
        with self.lock:
            return super().prepare_store(key, tokens, note)

    def complete_store(self, chunk: Chunk, success: bool) -> None:
        with self.lock:
            super().complete_store(chunk, success)

    def abandon(self, chunk: Chunk) -> None:
        with self.lock:
            super().abandon(chunk)

    def drop(self, key: bytes) -> None:
        with self.lock:
            super().drop(key)

    def clear(self) -> int:
        with self.lock:
            return super().clear()

    def grow(self, capacity: int) -> None:
        with self.lock:
            super().grow(capacity)

    def check(self, fix: bool = False) -> list[str]:
        with self.lock:
            return super().check(fix)
