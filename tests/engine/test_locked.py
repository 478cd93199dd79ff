"""A directory for two threads: each method locks, and a turn keeps others out."""

from __future__ import annotations

import inspect
import random
import threading
import time

from lmcache_ext.engine import Chunk, Directory, LockedDirectory
from lmcache_ext.policies import POLICIES


def make(slots: int = 8) -> LockedDirectory:
    directory = LockedDirectory(POLICIES.get("LRU")())
    directory.grow(slots)
    return directory


def test_every_method_that_changes_or_reads_chunks_is_locked() -> None:
    public = {name for name, _ in inspect.getmembers(Directory, inspect.isfunction) if not name.startswith("_")}
    assert public | {"__len__", "used"} <= LockedDirectory.__dict__.keys() | {"expect", "flush", "published"}


def test_a_turn_keeps_others_out_and_its_own_thread_in() -> None:
    directory = make()
    directory.begin_turn()
    directory.begin_turn()
    done = threading.Event()
    other = threading.Thread(target=lambda: (directory.prepare_store(b"k", 1), done.set()))
    other.start()
    assert not done.wait(0.1)
    assert isinstance(directory.prepare_store(b"mine", 1), Chunk)
    directory.end_turn()
    assert done.wait(5)
    directory.end_turn()
    other.join(5)
    assert directory.coming(b"k")


def test_a_lock_that_is_held_for_long_does_not_stop_the_scheduler() -> None:
    directory = make()
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with directory.lock:
            held.set()
            free.wait(10)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(5)
    begun = time.monotonic()
    directory.begin_turn()
    assert 0.2 < time.monotonic() - begun < 3
    directory.end_turn()
    free.set()
    other.join(5)


def test_two_threads_at_random_leave_no_fault() -> None:
    directory = make(16)

    def run(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(3000):
            key = bytes([rng.randrange(40)])
            if rng.random() < 0.5:
                chunk = directory.prepare_store(key, 1)
                if isinstance(chunk, Chunk):
                    directory.complete_store(chunk, rng.random() < 0.9)
            elif (leased := directory.lease([key])) is not None:
                directory.release(leased)
            else:
                directory.drop(key)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert directory.check() == [] and directory.leases == 0
