"""A medium that others use, too, and that bounds itself: no index of it is kept, and it is asked each time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from lmcache_ext.tiers import Found, Outcome, Runner
from tests.tiers.helpers import WHOLE, Unindexed, blank, chunk, content, end, found, gb, key, load, over, store, until


class Watched(Unindexed):
    """Counts, and lets a test hold writes up."""

    lasting = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []  # keys of each call
        self.written = self.listed = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def sizes(self, keys: Sequence[bytes]) -> list[int | None]:
        self.asked.append(len(keys))
        return super().sizes(keys)

    def write(self, key: bytes, header: memoryview, parts: Sequence[memoryview]) -> None:
        self.written += 1
        self.go_on.wait(timeout=20)
        super().write(key, header, parts)

    def scan(self, sweep: bool, faults: list[str]) -> Iterator[Found]:
        self.listed += 1
        return super().scan(sweep, faults)


@pytest.fixture
def medium() -> Watched:
    return Watched()


@pytest.fixture
def tier(medium: Watched) -> Iterator[Runner]:
    tier = over(medium, threads=1, load_queue=5)
    yield tier
    assert tier.check() == [] and tier.close(5)
    assert tier.counts().used == tier.counts().objects == tier.counts().evicted == 0


def test_a_look_up_asks_in_batches(tier: Runner, medium: Watched) -> None:
    store(tier, 1), store(tier, 4)
    assert found(tier, 0, 1, 2, 3, 4) == [False, True, False, False, True]
    assert medium.asked == [3, 2]


def test_a_look_up_that_is_too_long_for_the_queue_is_refused_from_there_on(tier: Runner, medium: Watched) -> None:
    for i in range(7):
        store(tier, i)
    outcomes = end(tier, tier.lookup([key(i) for i in range(7)])).outcomes
    assert outcomes == (Outcome.OK,) * 5 + (Outcome.REFUSED,) * 2
    assert found(tier, 0, 1, 2, 3, 4) == [True] * 5, "the queue is empty again"


def test_what_another_engine_stored_is_found_and_not_written_again(tier: Runner, medium: Watched) -> None:
    other = over(medium)
    assert store(other, 1) is Outcome.OK and other.close(5) is True
    again = end(tier, tier.submit_store([key(1)], [chunk(1)]))
    assert again.ok == [True] and again.nbytes == 0 and medium.written == 1
    assert found(tier, 1) == [True] and load(tier, 1) is Outcome.OK


def test_what_the_server_dropped_is_a_miss_and_can_be_stored_again(tier: Runner, medium: Watched) -> None:
    store(tier, 1)
    medium.remove(key(1))
    assert found(tier, 1) == [False] and load(tier, 1) is Outcome.MISS
    assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK


def test_an_object_of_another_length_is_replaced(tier: Runner, medium: Watched) -> None:
    store(tier, 1, chunk(1, 100))
    assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK and medium.written == 2


def test_what_is_deleted_while_it_is_written_goes_when_it_is_written() -> None:
    medium = Watched()
    tier = over(medium, threads=2)
    medium.go_on.clear()
    job = tier.submit_store([key(1)], [chunk(1)])
    until(lambda: medium.written == 1)
    assert end(tier, tier.delete([key(1)])).ok == [True]
    medium.go_on.set()
    assert end(tier, job).ok == [True]
    assert medium.size(key(1)) is None and load(tier, 1, blank()) is Outcome.MISS
    assert tier.counts().used == 0 and tier.check() == [] and tier.close(5)


def test_nothing_is_listed_but_by_check(tier: Runner, medium: Watched) -> None:
    assert tier.scanned and medium.listed == 0
    tier._try(tier._reads, write=False)
    assert tier.check() == [] and medium.listed == 1


def test_a_capacity_that_is_given_is_honoured_with_an_index(medium: Watched) -> None:
    store(other := over(medium), 9)
    assert other.close(5)
    tier = over(medium, capacity_gb=gb(2 * WHOLE))
    assert medium.listed == 1 and tier.counts().objects == 1
    for i in range(4):
        assert store(tier, i) is Outcome.OK
    assert tier.counts().used <= 2 * WHOLE and tier.counts().evicted == 3
    assert found(tier, 0, 1, 2, 3, 9) == [False, False, True, True, False]
    into = blank()
    assert load(tier, 3, into) is Outcome.OK and content(into) == content(chunk(3))
    assert tier.check() == [] and tier.close(5)
