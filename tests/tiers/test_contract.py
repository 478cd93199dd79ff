"""What every tier promises, over every medium there is, as it is and with the fault wrapper around it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lmcache_ext.tiers import Faults, Kind, Outcome, Runner
from lmcache_ext.tiers.fault import Faulty
from lmcache_ext.tiers.header import BLOCK
from tests.tiers.helpers import (
    KINDS,
    WHOLE,
    Gauge,
    as_stored,
    blank,
    chunk,
    content,
    end,
    found,
    gb,
    header_of,
    key,
    load,
    medium_of,
    memory,
    options_of,
    over,
    store,
    until,
    whole,
)

Make = Callable[..., Runner]


@pytest.fixture(params=[*KINDS, *(f"faulty {kind}" for kind in KINDS)])
def make(request: pytest.FixtureRequest, quick_path: Path) -> Iterator[Make]:
    """Opens tiers of one kind; `gauge=True` measures what is on the medium."""
    made: list[Runner] = []

    def open_one(gauge: bool = False, **options: Any) -> Runner:
        kind = request.param.removeprefix("faulty ")
        medium = medium_of(kind, quick_path / str(len(made)))
        options = {**options_of(kind, quick_path), **options}
        faults = Faults() if request.param.startswith("faulty") else None
        made.append(over(Gauge(medium) if gauge else medium, faults, **options))
        return made[-1]

    yield open_one
    for tier in made:
        assert tier.close(10)


@pytest.fixture(params=KINDS)
def spoilt(request: pytest.FixtureRequest, quick_path: Path) -> Iterator[Callable[..., tuple[Runner, Faulty]]]:
    """Opens a tier that works, to be spoilt by the test; with `unless_bounded`, if it needs an index anyway."""
    made: list[Runner] = []

    def open_one(unless_bounded: dict[str, Any] | None = None, **options: Any) -> tuple[Runner, Faulty]:
        medium = medium_of(request.param, quick_path)
        options = {**options_of(request.param, quick_path), **options}
        tier = over(medium, Faults(), **options, **({} if medium.bounded else unless_bounded or {}))
        made.append(tier)
        assert isinstance(tier.medium, Faulty)
        return tier, tier.medium

    yield open_one
    for tier in made:
        if isinstance(tier.medium, Faulty):
            tier.medium.heal()
        assert tier.close(10)


def test_what_was_stored_comes_back(make: Make) -> None:
    tier = make()
    shapes = [(1,), (4096,), (50_001,), (8192, 4096, 4096), (5, 0, 4096), ()]
    for i, lengths in enumerate(shapes):
        parts = chunk(i, *lengths) if lengths else []
        assert store(tier, i, parts) is Outcome.OK
        into = blank(*lengths) if lengths else []
        assert load(tier, i, into) is Outcome.OK
        assert content(into) == content(parts)
    assert tier.check() == []


def test_a_job_of_many_keys_has_an_outcome_for_each(make: Make) -> None:
    tier = make()
    job = tier.submit_store([key(i) for i in range(9)], [chunk(i) for i in range(9)])
    stored = end(tier, job)
    assert stored.ok == [True] * 9 and stored.nbytes == 9 * (WHOLE - BLOCK) and not stored.held
    assert found(tier, 3, 100, 4) == [True, False, True]
    into = [blank() for _ in range(4)]
    loaded = end(tier, tier.submit_load([key(i) for i in (7, 8, 9, 0)], into))
    assert loaded.outcomes == (Outcome.OK, Outcome.OK, Outcome.MISS, Outcome.OK) and loaded.leading == 2
    assert content(into[0]) == content(chunk(7)) and content(into[3]) == content(chunk(0))
    counts = tier.counts()
    assert (counts.of(Kind.STORE), counts.of(Kind.LOAD, Outcome.MISS)) == (9, 1)
    assert counts.objects == (9 if tier.index.keeps else 0)
    assert counts.loaded_bytes == 3 * (WHOLE - BLOCK)


def test_jobs_of_no_keys_end_at_once(make: Make) -> None:
    tier = make()
    jobs = [tier.lookup([]), tier.submit_store([], []), tier.submit_load([], []), tier.delete([])]
    assert [result.job for result in tier.poll()] == jobs


def test_a_second_store_writes_nothing(make: Make) -> None:
    tier = make()
    store(tier, 1)
    again = end(tier, tier.submit_store([key(1)], [chunk(1)]))
    assert (again.ok, again.nbytes) == ([True], 0)


def test_what_was_deleted_is_gone(make: Make) -> None:
    tier = make()
    store(tier, 1), store(tier, 2)
    job = tier.delete([key(1), key(3)])
    until(lambda: tier.wait(0))
    assert [r.ok for r in tier.poll() if r.job == job] == [[True, True]]
    assert found(tier, 1, 2) == [False, True]
    assert load(tier, 1) is Outcome.MISS
    assert tier.medium.size(key(1)) is None
    assert tier.counts().used == (tier.medium.footprint(whole(tier)) if tier.index.keeps else 0)
    assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK
    assert tier.check() == []


def _flip(at: int) -> Callable[[memoryview, list[memoryview]], None]:
    def spoil(header: memoryview, parts: list[memoryview]) -> None:
        view, offset = (header, at) if at < BLOCK else (parts[0], at - BLOCK)
        view[offset] ^= 1

    return spoil


def _cut(header: memoryview, parts: list[memoryview]) -> None:
    parts[-1] = parts[-1][:-4096]


def _grow(header: memoryview, parts: list[memoryview]) -> None:
    parts.extend(memory(4096))


def _swap(header: memoryview, parts: list[memoryview]) -> None:
    header[:] = header_of(key(2), parts)


def _mix(header: memoryview, parts: list[memoryview]) -> None:
    parts[:] = parts[::-1]


def _other_shape(header: memoryview, parts: list[memoryview]) -> None:
    parts[:] = chunk(1, 4096, 4096)
    header[:] = header_of(key(1), parts)


def _zeros(header: memoryview, parts: list[memoryview]) -> None:
    for view in (header, *parts):
        view[:] = bytes(len(view))


def _expired(header: memoryview, parts: list[memoryview]) -> None:
    header[:] = header_of(key(1), parts, expires=time.time() - 1)


SPOILT = {
    "magic": (_flip(0), Outcome.CORRUPT),
    "schema": (_flip(8), Outcome.FOREIGN),
    "key": (_flip(40), Outcome.CORRUPT),
    "sum": (_flip(70), Outcome.CORRUPT),
    "first byte": (_flip(BLOCK), Outcome.CORRUPT),
    "some byte": (_flip(BLOCK + 8000), Outcome.CORRUPT),
    "cut off": (_cut, Outcome.CORRUPT),
    "too long": (_grow, Outcome.CORRUPT),
    "another's": (_swap, Outcome.FOREIGN),
    "parts in another order": (_mix, Outcome.CORRUPT),
    "another shape": (_other_shape, Outcome.FOREIGN),
    "zeros": (_zeros, Outcome.CORRUPT),
    "too old": (_expired, Outcome.EXPIRED),
}


def test_what_is_not_what_was_asked_for_is_a_miss_and_leaves(make: Make) -> None:
    tier = make(faults=100)
    store(tier, 2)
    for how, (spoil, outcome) in SPOILT.items():
        store(tier, 1)
        parts = as_stored(tier, 1)
        header = header_of(key(1), parts)
        spoil(header, parts)
        tier.medium.write(key(1), header, parts)
        loaded = load(tier, 1)
        assert loaded is outcome or (tier.medium.bounded and {loaded, outcome} == {Outcome.EXPIRED, Outcome.MISS}), how
        assert found(tier, 1, 2) == [False, True], how
        assert tier.medium.size(key(1)) is None, f"{how}: it is still there"
    assert tier.counts().of(Kind.LOAD) == len(SPOILT)
    assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK
    assert tier.check() == []


def test_objects_expire(make: Make) -> None:
    tier = make(ttl=0.2)
    store(tier, 1)
    assert load(tier, 1) is Outcome.OK
    time.sleep(0.25)
    if tier.index.keeps:
        assert found(tier, 1) == [False]
    loaded = load(tier, 1)
    assert loaded is Outcome.EXPIRED or (tier.medium.bounded and loaded is Outcome.MISS)
    until(lambda: tier.medium.size(key(1)) is None)
    assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK


def test_capacity_holds_at_every_moment(make: Make) -> None:
    tier = make(gauge=True)
    footprint = tier.medium.footprint(whole(tier))
    tier = make(gauge=True, capacity_gb=gb(5 * footprint + 100), store_queue=1000, threads=3)
    gauge = tier.medium.inner if isinstance(tier.medium, Faulty) else tier.medium
    assert isinstance(gauge, Gauge)
    jobs = [tier.submit_store([key(i)], [chunk(i)]) for i in range(60)]
    ended = []
    while len(ended) < len(jobs):
        assert tier.wait(10)
        ended += tier.poll()
        assert tier.counts().used <= 5 * footprint + 100
    assert gauge.peak <= 5 * footprint
    assert sum(r.ok[0] for r in ended) + tier.counts().of(Kind.STORE, Outcome.FULL) == 60
    assert store(tier, 100) is Outcome.OK
    assert tier.counts().objects == 5 and tier.counts().evicted >= 10
    assert store(tier, 101, chunk(101, 6 * footprint)) is Outcome.FULL
    assert found(tier, 100) == [True] and tier.check() == []


def test_the_least_recently_used_leaves_first(make: Make) -> None:
    tier = make()
    tier = make(capacity_gb=gb(3 * tier.medium.footprint(whole(tier))))
    for i in (1, 2, 3):
        store(tier, i)
    load(tier, 1)
    store(tier, 4)
    assert found(tier, 1, 2, 3, 4) == [True, False, True, True]


def test_check_finds_orphans_and_losses_and_mends_them(make: Make) -> None:
    tier = make(capacity_gb=1.0)
    for i in (1, 2):
        store(tier, i)
    parts = as_stored(tier, 3)
    tier.medium.write(key(3), header_of(key(3), parts), parts)
    tier.medium.remove(key(1))
    kinds = ["in the index only"] + ["not in the index"] * (not tier.medium.shared)
    assert sorted(fault.split(" is ")[1] for fault in tier.check()) == kinds
    assert len(tier.check(fix=True)) == len(kinds)
    assert tier.check() == []
    assert found(tier, 1, 2, 3) == [False, True, True]
    assert load(tier, 3) is Outcome.OK


def test_misuse_is_refused_where_it_happens(make: Make) -> None:
    tier = make()
    readonly = [memoryview(bytes(10))]
    for misuse in (
        lambda: tier.lookup([b"short"]),
        lambda: tier.submit_store([key(1)], []),
        lambda: tier.submit_load([key(1)], [readonly]),
        lambda: tier.submit_store([key(1)], [[memoryview(bytes(10))[::2]]]),
    ):
        with pytest.raises(ValueError):
            misuse()
    assert tier.poll() == []


def test_after_close_every_job_ends_at_once(make: Make) -> None:
    tier = make()
    store(tier, 1)
    assert tier.close(5) and tier.close(5)
    jobs = [tier.lookup([key(1)]), tier.submit_load([key(1)], [blank()]), tier.submit_store([key(2)], [chunk(2)])]
    jobs.append(tier.delete([key(1)]))
    results = tier.poll()
    assert [r.job for r in results] == jobs
    assert {outcome for r in results for outcome in r.outcomes} == {Outcome.CLOSED}


# -- spoilt on purpose ------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once(spoilt: Callable[..., tuple[Runner, Faulty]]) -> None:
    tier, medium = spoilt(store_queue=4, threads=2)
    medium.faults.hang = 1
    began = time.monotonic()
    jobs = [tier.submit_store([key(i), key(100 + i)], [chunk(i), chunk(i)], timeout=30) for i in range(20)]
    assert time.monotonic() - began < 10
    results = tier.poll()
    assert [r.job for r in results] == jobs[2:] and {o for r in results for o in r.outcomes} == {Outcome.REFUSED}
    assert tier.counts().of(Kind.STORE, Outcome.REFUSED) == 36
    medium.heal()
    until(lambda: tier.counts().of(Kind.STORE, Outcome.OK) == 4)
    assert [r.job for r in tier.poll()] == jobs[:2] and found(tier, 0, 1, 100, 101) == [True] * 4


@pytest.mark.parametrize("kind", [Kind.STORE, Kind.LOAD])
def test_a_hang_ends_by_the_deadline_and_holds_its_buffers(
    spoilt: Callable[..., tuple[Runner, Faulty]], kind: Kind
) -> None:
    tier, medium = spoilt(threads=2)
    store(tier, 1)
    medium.faults.hang = 1
    began = time.monotonic()
    if kind is Kind.STORE:
        job = tier.submit_store([key(2)], [chunk(2)], timeout=0.2)
    else:
        job = tier.submit_load([key(1)], [blank()], timeout=0.2)
    result = end(tier, job)
    assert 0.2 <= time.monotonic() - began < 10
    assert (result.outcomes, result.held) == ((Outcome.LATE,), (0,))
    assert tier.freed() == [] and tier.counts().held == 1
    medium.heal()
    until(lambda: tier.counts().held == 0)
    assert tier.freed() == [(job, 0)] and tier.freed() == []
    assert tier.poll() == [], "a second result"
    assert tier.check() == []


def test_close_is_in_time_though_io_hangs(spoilt: Callable[..., tuple[Runner, Faulty]]) -> None:
    tier, medium = spoilt(threads=4)
    store(tier, 1)
    medium.faults.hang = 1
    load_job = tier.submit_load([key(1)], [blank()], timeout=30)
    stores = [tier.submit_store([key(i)], [chunk(i)], timeout=30) for i in range(10, 20)]
    until(lambda: medium.done["hang"] >= 4)
    began = time.monotonic()
    assert not tier.close(0.3)
    assert time.monotonic() - began < 10
    results = tier.poll()
    assert sorted(r.job for r in results) == [load_job, *stores]
    assert {o for r in results for o in r.outcomes} == {Outcome.CLOSED}
    assert sum(len(r.held) for r in results) == 4, "one load and three stores had begun"


def test_the_breaker_opens_once_and_closes_by_itself(
    spoilt: Callable[..., tuple[Runner, Faulty]], caplog: pytest.LogCaptureFixture
) -> None:
    tier, medium = spoilt(faults=3)
    store(tier, 1)
    caplog.set_level(logging.WARNING, "lmcache_ext.tiers")
    medium.faults.error = 1
    assert [load(tier, 1) for _ in range(3)] == [Outcome.FAILED] * 3
    spoilt_calls = medium.done["error"]
    began = time.monotonic()
    assert [load(tier, 1) for _ in range(2)] == [Outcome.OFF] * 2
    assert found(tier, 1) == [False]
    if time.monotonic() - began < 0.04:
        assert medium.done["error"] == spoilt_calls, "the medium was asked though the breaker is open"
    assert tier.counts().trips == 1
    medium.heal()
    until(lambda: load(tier, 1) is Outcome.OK)
    until(lambda: tier.check() == [])
    switched = [r.message for r in caplog.records if r.name == "lmcache_ext.tiers"]
    assert len(switched) == 2 and "switched off" in switched[0] and "works again" in switched[1]


def test_failing_writes_leave_reads_alone(spoilt: Callable[..., tuple[Runner, Faulty]]) -> None:
    tier, medium = spoilt(faults=2, cooldown=30)
    store(tier, 1)
    medium.faults.error = 1
    assert [store(tier, i) for i in (2, 3, 4)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
    medium.faults.error = 0
    assert load(tier, 1) is Outcome.OK and found(tier, 1, 2) == [True, False]


def test_a_deletion_that_failed_is_invisible_counts_and_is_made_up_for(
    spoilt: Callable[..., tuple[Runner, Faulty]],
) -> None:
    tier, medium = spoilt(capacity_gb=1.0)
    store(tier, 1)
    medium.faults.error = 1
    assert end(tier, tier.delete([key(1)])).outcomes == (Outcome.FAILED,)
    medium.faults.error = 0
    assert found(tier, 1) == [False] and tier.counts().used == medium.footprint(whole(tier))
    assert store(tier, 1) is Outcome.REFUSED
    assert len(tier.check(fix=True)) == 1
    assert tier.check() == [] and tier.counts().used == 0
    assert store(tier, 1) is Outcome.OK


STORMS = {
    "flip": Faults(flip=0.3),
    "short": Faults(short=0.3),
    "error": Faults(error=0.2),
    "all": Faults(flip=0.1, short=0.1, error=0.1, delay=0.2, delay_s=0.003),
}


@pytest.mark.parametrize("storm", STORMS)
def test_a_storm_of_faults_brings_no_wrong_byte(spoilt: Callable[..., tuple[Runner, Faulty]], storm: str) -> None:
    tier, medium = spoilt({"capacity_gb": gb(10 * 16384)}, faults=10**6, load_queue=50, store_queue=20)
    medium.faults = Faults(**{**vars(STORMS[storm]), "seed": 3})
    rng = Random(storm)
    wanted: dict[int, tuple[list[int], list[list[memoryview]]]] = {}
    results: Counter[int] = Counter()
    good = 0

    def collect() -> None:
        nonlocal good
        for result in tier.poll():
            results[result.job] += 1
            numbers, buffers = wanted.get(result.job, ([], []))
            if not result.held:
                wanted.pop(result.job, None)
            assert len(result.outcomes) == len(numbers) or not numbers
            for i, parts, outcome in zip(numbers, buffers, result.outcomes, strict=False):
                if outcome is Outcome.OK:
                    good += 1
                    assert content(parts) == content(chunks[i]), "wrong bytes"

    chunks = {i: chunk(i) for i in range(12)}
    jobs: list[int] = []

    def tested() -> bool:
        return good > 5 and sum(medium.done.values()) > 8

    limit = 10 * 16384 + 100
    began = time.monotonic()
    while len(jobs) < 250 or not tested():
        assert time.monotonic() - began < 60, "the test tests nothing"
        numbers = [rng.randrange(12) for _ in range(rng.randrange(1, 3))]
        keys = [key(i) for i in numbers]
        roll = rng.random()
        if roll < 0.45:
            jobs.append(tier.submit_store(keys, [chunks[i] for i in numbers]))
        elif roll < 0.9:
            buffers = [blank() for _ in numbers]
            jobs.append(tier.submit_load(keys, buffers))
            wanted[jobs[-1]] = (numbers, buffers)
        else:
            jobs.append(tier.lookup(keys) if roll < 0.95 else tier.delete(keys))
        collect()
        if medium.shared and not medium.bounded:  # what others may have written is found, and trimmed right afterwards
            until(lambda: tier.counts().used <= limit)
        assert medium.bounded or medium.shared or tier.counts().used <= limit
        time.sleep(0.0005 if len(jobs) < 250 else 0.01)  # more than it can do, and then for as long as it takes
    until(lambda: (tier.wait(0.01), collect(), len(results) == len(jobs))[-1])
    assert set(results.values()) == {1} and sorted(results) == sorted(jobs), "not one result for each job"
    medium.heal()
    tier.check(fix=True)
    assert tier.check() == []
