"""Who works on what, and when nobody may any more."""

from __future__ import annotations

import threading

from lmcache_ext.tiers import Faults, Faulty, Outcome, Parts
from lmcache_ext.tiers.example import Example
from tests.tiers.helpers import blank, chunk, content, end, key, load, over, store, until


class StuckWrites(Example):
    """Writes wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.waiting = 0

    def write(self, key: bytes, header: memoryview, parts: Parts) -> None:
        self.waiting += 1
        self.let_go.wait(timeout=20)
        super().write(key, header, parts)


def test_stores_leave_a_thread_to_loads() -> None:
    medium = StuckWrites()
    tier = over(medium, threads=3)
    medium.let_go.set()
    store(tier, 1)
    medium.let_go.clear()
    medium.waiting = 0
    job = tier.submit_store([key(i) for i in range(10, 20)], [chunk(i) for i in range(10, 20)])
    until(lambda: medium.waiting == 2)
    assert load(tier, 1) is Outcome.OK
    medium.let_go.set()
    assert all(end(tier, job).ok)
    assert tier.close(5)


def test_a_job_that_ended_in_the_queue_never_touches_its_buffers() -> None:
    tier = over(Example(), Faults(), threads=1)
    medium = tier.medium
    assert isinstance(medium, Faulty)
    store(tier, 1)
    medium.faults.hang = 1
    hanging = tier.submit_load([key(1)], [blank()], timeout=20)
    until(lambda: medium.done["hang"] == 1)
    into = blank()
    late = end(tier, tier.submit_load([key(1)], [into], timeout=0.05))
    assert (late.outcomes, late.held) == ((Outcome.LATE,), ()), "its buffers are the caller's again"
    gone = end(tier, tier.delete([key(1)], timeout=0.05))
    assert gone.outcomes == (Outcome.OK,), "its reader removes it"
    medium.heal()
    assert end(tier, hanging).ok == [True]
    assert store(tier, 2) is Outcome.OK and load(tier, 2) is Outcome.OK
    assert not any(content(into)) and tier.freed() == []
    assert tier.check() == [] and tier.close(5)


def test_only_real_work_that_succeeds_calms_a_breaker() -> None:
    tier = over(Example(), Faults(), faults=2, cooldown=30.0)
    medium = tier.medium
    assert isinstance(medium, Faulty)
    store(tier, 1), store(tier, 2), store(tier, 3)
    medium.inner.remove(key(2))
    medium.faults.error = 1
    assert load(tier, 1) is Outcome.FAILED
    medium.faults.error = 0
    assert load(tier, 3) is Outcome.OK
    medium.faults.error = 1
    assert load(tier, 1) is Outcome.FAILED and tier.counts().trips == 0
    medium.faults.error = 0
    assert load(tier, 2) is Outcome.MISS
    medium.faults.error = 1
    assert load(tier, 1) is Outcome.FAILED and tier.counts().trips == 1
    assert tier.close(5)


def test_what_is_deleted_while_it_is_written_is_gone_when_it_is_written() -> None:
    medium = StuckWrites()
    tier = over(medium)
    job = tier.submit_store([key(1)], [chunk(1)])
    until(lambda: medium.waiting == 1)
    assert end(tier, tier.delete([key(1)])).ok == [True]
    medium.let_go.set()
    assert end(tier, job).ok == [True]
    assert medium.size(key(1)) is None and load(tier, 1) is Outcome.MISS
    assert tier.counts().used == 0 and tier.check() == [] and tier.close(5)
