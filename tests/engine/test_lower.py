"""The chain below L1, over tiers whose answers the test gives by hand."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest

from lmcache_ext.engine import Chunk, Directory, Level, Lower, Want, lower
from lmcache_ext.metrics import Recorder
from lmcache_ext.policies import POLICIES
from lmcache_ext.tiers import Counts, JobResult, Kind, Outcome, Parts, Tier
from lmcache_ext.tracing import Span, Trace

OK, MISS, FAILED, LATE, REFUSED = Outcome.OK, Outcome.MISS, Outcome.FAILED, Outcome.LATE, Outcome.REFUSED


class Slow(Tier):
    """Nothing ends before the test says so. Look-ups answer at once, from `has`."""

    def __init__(self, *has: bytes) -> None:
        self.has = set(has)
        self.numbers = itertools.count(1)
        self.open: dict[bytes, tuple[int, Kind]] = {}
        self.results: list[JobResult] = []
        self.back: list[tuple[int, int]] = []

    def lookup(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        job = next(self.numbers)
        self.results.append(JobResult(job, Kind.LOOKUP, tuple(OK if key in self.has else MISS for key in keys)))
        return job

    def submit_store(self, keys: Sequence[bytes], buffers: Sequence[Parts], timeout: float | None = None) -> int:
        return self._submit(Kind.STORE, keys[0])

    def submit_load(self, keys: Sequence[bytes], buffers: Sequence[Parts], timeout: float | None = None) -> int:
        return self._submit(Kind.LOAD, keys[0])

    def _submit(self, kind: Kind, key: bytes) -> int:
        job = next(self.numbers)
        self.open[key] = (job, kind)
        return job

    def end(self, key: bytes, fate: Outcome = OK, held: bool = False) -> int:
        job, kind = self.open.pop(key)
        self.results.append(JobResult(job, kind, (fate,), (0,) if held else (), 100 * (fate is OK)))
        return job

    def delete(self, keys: Sequence[bytes], timeout: float | None = None) -> int:
        return next(self.numbers)

    def poll(self) -> list[JobResult]:
        results, self.results = self.results, []
        return results

    def freed(self) -> list[tuple[int, int]]:
        back, self.back = self.back, []
        return back

    def wait(self, timeout: float) -> bool:
        return bool(self.results)

    def counts(self) -> Counts:
        return Counts()

    def check(self, fix: bool = False) -> list[str]:
        return []

    def close(self, timeout: float) -> bool:
        return True


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def wants(*numbers: int) -> list[Want]:
    return [Want(key(i), 64) for i in numbers]


class Bench:
    def __init__(self, *tiers: Slow, slots: int = 8, writers: int = 2, **more: object) -> None:
        self.directory = Directory(POLICIES.get("LRU")())
        self.directory.grow(slots)
        self.recorder = Recorder()
        kinds = ("disk", "remote")
        pairs = enumerate(zip(kinds, tiers, strict=False))
        levels = [Level(kind, tier, writes=i < writers) for i, (kind, tier) in pairs]
        self.lower = Lower(self.directory, levels, self.parts, self.recorder, **more)  # type: ignore[arg-type]

    def parts(self, slot: int, tokens: int) -> list[memoryview]:
        return [memoryview(bytearray(tokens))]

    def stored(self, *numbers: int) -> list[Chunk]:
        chunks = []
        for i in numbers:
            chunk = self.directory.prepare_store(key(i), 64)
            assert isinstance(chunk, Chunk)
            self.directory.complete_store(chunk, True)
            chunks.append(chunk)
        return chunks

    def end(self, tier: Slow, fate: Outcome = OK) -> None:
        """All that `tier` has under way ends, and is taken."""
        for each in list(tier.open):
            tier.end(each, fate)
        self.lower.poll()

    def total(self, name: str) -> float:
        return self.recorder.totals.get(name, 0)

    def at_rest(self) -> None:
        assert self.directory.leases == 0 and self.directory.check() == []
        assert not self.lower.busy


def test_written_back_and_held_meanwhile() -> None:
    tier = Slow()
    bench = Bench(tier, slots=4)
    bench.lower.offer(bench.stored(1))
    bench.lower.poll()
    assert bench.lower.busy and bench.directory.leases == 1
    bench.stored(2, 3, 4, 5)  # evicts, but not what is being written
    assert bench.directory.ready(key(1)) is not None
    tier.end(key(1))
    bench.lower.poll()
    assert bench.total("disk_stored_bytes") == 100
    bench.at_rest()


def test_a_quarter_of_memory_at_most_is_held_by_writes_and_the_rest_waits_unheld() -> None:
    tier = Slow()
    bench = Bench(tier, slots=8)
    bench.lower.offer(bench.stored(*range(1, 7)))
    bench.lower.poll()
    assert len(tier.open) == 2 == bench.directory.leases
    bench.directory.drop(key(3))  # leaves before its turn
    for _ in range(6):
        for each in list(tier.open):
            tier.end(each)
        bench.lower.poll()
    assert bench.total("disk_skipped_chunks") == 1 and bench.total("disk_stored_bytes") == 500
    bench.at_rest()


def test_a_tier_whose_writes_hang_costs_another_none() -> None:
    near, far = Slow(), Slow()
    bench = Bench(near, far, slots=64)
    for first in range(0, 400, 40):  # far more than fits: what waits for the second tier may be evicted
        bench.lower.offer(bench.stored(*range(first, first + 40)))
        bench.lower.poll()
        while near.open:
            assert len(near.open) == 8, "an eighth of memory for each of two"
            bench.end(near)
    assert bench.total("disk_stored_bytes") == 40_000
    assert len(far.open) == 8 == bench.directory.leases and set(far.open) == {key(i) for i in range(8)}
    while far.open:
        bench.end(far)
    assert bench.total("remote_stored_bytes") >= 800
    assert bench.total("remote_stored_bytes") / 100 + bench.total("remote_skipped_chunks") == 400
    bench.at_rest()


def test_a_tier_that_only_reads_takes_no_places_from_writes() -> None:
    near = Slow()
    bench = Bench(near, Slow(), slots=8, writers=1)
    bench.lower.offer(bench.stored(1, 2, 3))
    bench.lower.poll()
    assert len(near.open) == 2
    while near.open:
        bench.end(near)
    bench.at_rest()


@pytest.mark.parametrize("far_fate", [OK, FAILED, REFUSED])
def test_what_memory_does_not_keep_leaves_it_once_every_tier_had_its_turn(far_fate: Outcome) -> None:
    near, far = Slow(), Slow()
    bench = Bench(near, far, slots=8, keeps=False)
    bench.lower.offer(bench.stored(1, 2))
    bench.lower.poll()
    bench.end(near)
    bench.end(near)
    assert (set(near.open), set(far.open)) == (set(), {key(1)})
    assert bench.directory.match([key(1), key(2)]) == 2, "the second tier has neither"
    bench.end(far, far_fate)
    assert bench.directory.ready(key(1)) is None and bench.directory.ready(key(2)) is not None
    bench.end(far, far_fate)
    assert len(bench.directory) == 0
    bench.at_rest()


def test_what_no_tier_took_stays_in_memory() -> None:
    near, far = Slow(), Slow()
    bench = Bench(near, far, keeps=False)
    bench.lower.offer(bench.stored(1))
    bench.lower.poll()
    bench.end(near, FAILED)
    bench.end(far, REFUSED)
    assert bench.directory.ready(key(1)) is not None
    bench.at_rest()


def test_a_list_that_is_full_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_BACKLOG", 4)
    tier = Slow()
    bench = Bench(tier, slots=64)
    bench.lower.offer(bench.stored(*range(6)))
    bench.lower.poll()
    assert set(tier.open) == {key(i) for i in range(2, 6)} and bench.total("disk_skipped_chunks") == 2
    bench.end(tier)
    bench.at_rest()


def test_what_left_before_its_turn_is_passed_over_a_bounded_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_MOST_TURNS", 3)
    bench = Bench(Slow(), slots=64)
    bench.lower.offer(bench.stored(*range(8)))
    bench.directory.clear()
    for skipped in (3, 6, 8):
        assert bench.lower.busy
        bench.lower.poll()
        assert bench.total("disk_skipped_chunks") == skipped
    bench.at_rest()


@pytest.mark.parametrize(("fate", "counted"), [(FAILED, "disk_failed_jobs"), (REFUSED, "disk_skipped_chunks")])
def test_a_write_that_fails_leaves_memory_as_it_was(fate: Outcome, counted: str) -> None:
    tier = Slow()
    bench = Bench(tier)
    bench.lower.offer(bench.stored(1))
    bench.lower.poll()
    tier.end(key(1), fate)
    bench.lower.poll()
    assert bench.total(counted) == 1 and bench.directory.ready(key(1)) is not None
    bench.at_rest()


@pytest.mark.parametrize("way", ["store", "load"])
def test_a_buffer_that_hangs_keeps_its_slot_until_it_comes_back(way: str) -> None:
    tier = Slow(key(1))
    bench = Bench(tier, slots=4)
    if way == "store":
        bench.lower.offer(bench.stored(1))
        bench.lower.poll()
    else:
        assert bench.lower.fetch("r", wants(1), 10)
    job = tier.end(key(1), LATE, held=True)
    bench.lower.poll()
    assert bench.directory.leases == 1
    if way == "load":
        assert not bench.lower.fetch("r", [], 10)
        assert bench.directory.ready(key(1)) is None
    bench.lower.release("r")
    used = {chunk.slot for chunk in bench.stored(10, 11, 12)}
    assert len(used) == 3 and bench.directory.used == 4
    tier.back.append((job, 0))
    bench.lower.poll()
    bench.at_rest()


def test_what_was_fetched_is_held_until_its_request_has_it() -> None:
    tier = Slow(key(1), key(2))
    bench = Bench(tier, slots=4)
    assert bench.lower.fetch("r", wants(1, 2, 3), 10)
    tier.end(key(2))
    assert bench.lower.fetch("r", [], 10)  # the first is missing
    tier.end(key(1))
    assert not bench.lower.fetch("r", [], 10)
    bench.stored(10, 11, 12, 13)
    assert bench.directory.match([key(1), key(2)]) == 2
    bench.lower.release("r")
    assert bench.total("disk_hit_tokens") == 128
    bench.at_rest()


def test_a_hole_ends_the_run_and_what_lies_behind_is_not_waited_for() -> None:
    tier = Slow(key(1), key(2), key(3))
    bench = Bench(tier)
    assert bench.lower.fetch("r", wants(1, 2, 3), 10)
    tier.end(key(2), Outcome.CORRUPT)
    tier.end(key(1))
    assert not bench.lower.fetch("r", [], 10)  # the third is still under way
    assert bench.directory.match([key(1), key(2)]) == 1
    tier.end(key(3))
    bench.lower.release("r")
    bench.lower.poll()
    assert bench.directory.ready(key(3)) is not None
    bench.at_rest()


def test_it_says_what_comes_soon_once_all_of_it_is_under_way() -> None:
    tier = Slow(*(key(i) for i in range(1, 7)))
    bench = Bench(tier, slots=8)  # half of them for fetches
    soon = lambda: [want.key for want in bench.lower.soon("r")[0]]  # noqa: E731
    assert bench.lower.soon("r") == ((), 0.0)
    assert bench.lower.fetch("r", wants(*range(1, 7)), 10)
    assert soon() == [] and len(tier.open) == 4
    tier.end(key(2))
    assert bench.lower.fetch("r", [], 10) and soon() == []  # the sixth has no place yet
    time.sleep(0.02)
    tier.end(key(1))
    assert bench.lower.fetch("r", [], 10)
    assert soon() == [key(i) for i in range(3, 7)]
    assert bench.lower.soon("r")[1] >= 0.02 / 2 * 4  # two came in that time, four are to come
    tier.end(key(4), FAILED)
    assert bench.lower.fetch("r", [], 10) and soon() == [key(3)]
    for i in (3, 5, 6):
        tier.end(key(i))
    assert not bench.lower.fetch("r", [], 10) and soon() == []
    bench.lower.release("r")
    bench.at_rest()


def test_the_second_tier_is_asked_for_what_the_first_lacks() -> None:
    near, far = Slow(key(1)), Slow(key(1), key(2))
    bench = Bench(near, far)
    assert bench.lower.fetch("r", wants(1, 2), 10)
    assert (set(near.open), set(far.open)) == ({key(1)}, {key(2)})
    near.end(key(1))
    far.end(key(2))
    assert not bench.lower.fetch("r", [], 10)
    assert (bench.total("disk_hit_tokens"), bench.total("remote_hit_tokens")) == (64, 64)
    bench.lower.release("r")
    bench.at_rest()


def test_a_tier_whose_loads_hang_costs_another_none() -> None:
    near, far = Slow(*map(key, range(20, 24))), Slow(*map(key, range(12)))
    bench = Bench(near, far, slots=16)
    assert bench.lower.fetch("stuck", wants(*range(12)), 60)
    assert len(far.open) == 4, "a quarter of memory for each of two"
    assert bench.lower.fetch("r", wants(*range(20, 24)), 60)
    assert len(near.open) == 4
    bench.end(near)
    assert not bench.lower.fetch("r", [], 60) and bench.directory.match([key(i) for i in range(20, 24)]) == 4
    bench.lower.release("r")
    bench.lower.release("stuck")
    bench.end(far)
    bench.at_rest()


def test_a_tier_is_not_thought_slow_because_another_is() -> None:
    near, far = Slow(key(1)), Slow(key(2))
    bench = Bench(near, far)
    assert bench.lower.fetch("r", wants(1, 2), 60)
    bench.end(near)
    disk, remote = bench.lower.levels
    learnt = disk.rate
    assert learnt > 0 and remote.rate == 0, "the first has brought all that it was asked for"
    bench.end(far)
    assert disk.rate == learnt and remote.rate > 0
    assert not bench.lower.fetch("r", [], 60)
    bench.lower.release("r")
    bench.at_rest()


def test_what_a_fast_tier_has_comes_and_what_a_slow_one_has_behind_it_is_computed() -> None:
    near, far = Slow(key(1), key(2)), Slow(key(3), key(4))
    bench = Bench(near, far, slots=16, compute_rate=lambda: 64_000.0, lookup_seconds=60)
    for level, rate in zip(bench.lower.levels, (1e9, 1.0), strict=True):
        level.rate, level.tried = rate, time.monotonic() + 600  # as if just now
    assert bench.lower.fetch("r", wants(1, 2, 3, 4), 60)
    assert (set(near.open), set(far.open)) == ({key(1), key(2)}, set())
    assert bench.total("num_slow_tier_tokens") == 128
    bench.end(near)
    assert not bench.lower.fetch("r", [], 60) and bench.directory.match([key(1), key(2)]) == 2
    bench.lower.release("r")
    bench.at_rest()


def test_a_slow_tier_is_tried_again_also_if_a_fast_one_is_in_use() -> None:
    near, far = Slow(key(1)), Slow(key(2))
    bench = Bench(near, far, slots=16, compute_rate=lambda: 64_000.0, lookup_seconds=60)
    disk, remote = bench.lower.levels
    disk.rate, disk.tried = 1e9, time.monotonic() + 600
    remote.rate, remote.tried = 1.0, time.monotonic() - 60
    assert bench.lower.fetch("r", wants(1, 2), 60)
    assert (set(near.open), set(far.open)) == ({key(1)}, {key(2)})
    bench.end(near), bench.end(far)
    assert not bench.lower.fetch("r", [], 60)
    bench.lower.release("r")
    bench.at_rest()


def test_a_request_that_goes_leaves_what_is_on_its_way_to_others() -> None:
    tier = Slow(key(1))
    bench = Bench(tier)
    assert bench.lower.fetch("first", wants(1), 10)
    assert bench.lower.fetch("second", wants(1), 10)
    bench.lower.release("first")
    assert len(tier.open) == 1
    tier.end(key(1))
    assert not bench.lower.fetch("second", [], 10)
    bench.lower.release("second")
    bench.at_rest()


def test_patience_ends() -> None:
    tier = Slow(key(1))
    bench = Bench(tier)
    assert bench.lower.fetch("r", wants(1), 0.05)
    time.sleep(0.06)
    assert not bench.lower.fetch("r", [], 0.05)
    bench.lower.release("r")
    tier.end(key(1))
    bench.lower.poll()
    bench.at_rest()


def test_nothing_is_waited_for_longer_than_computing_takes() -> None:
    tier = Slow(key(1))
    bench = Bench(tier, compute_rate=lambda: 64_000.0, lookup_seconds=0.01)
    assert bench.lower.fetch("r", wants(1), 10)
    time.sleep(0.02)  # 64 tokens take a millisecond
    assert not bench.lower.fetch("r", [], 10)
    bench.lower.release("r")
    tier.end(key(1))
    bench.lower.poll()
    assert bench.lower.levels[0].rate < 100 / 0.02  # bytes/s
    bench.directory.clear()
    assert not bench.lower.fetch("r", wants(1), 10)  # the tier is known to be slower now
    assert bench.total("num_slow_tier_tokens") == 64
    bench.lower.levels[0].tried -= 60
    bench.lower.release("r")
    assert bench.lower.fetch("r", wants(1), 10)  # but it may have become faster
    tier.end(key(1))
    bench.lower.release("r")
    bench.lower.poll()
    bench.at_rest()


def test_a_reset_forgets_what_is_on_its_way() -> None:
    tier = Slow(key(1))
    bench = Bench(tier)
    assert bench.lower.fetch("r", wants(1), 10)
    bench.directory.clear()
    tier.end(key(1))
    bench.lower.fetch("r", [], 10)
    assert bench.directory.ready(key(1)) is None
    bench.lower.release("r")
    bench.at_rest()


def test_half_of_memory_at_most_is_under_way_at_once_and_what_it_holds_ends_the_run() -> None:
    tier = Slow(*[key(i) for i in range(1, 13)])
    bench = Bench(tier, slots=8)
    assert bench.lower.fetch("r", wants(*range(1, 13)), 10)
    while True:
        assert len(tier.open) <= 4
        for each in list(tier.open):
            tier.end(each)
        if not bench.lower.fetch("r", [], 10):
            break
    assert bench.directory.match([key(i) for i in range(1, 13)]) == 8
    bench.lower.release("r")
    bench.at_rest()


def test_closing_lets_writes_end() -> None:
    tier = Slow()
    bench = Bench(tier)
    bench.lower.offer(bench.stored(1))
    bench.lower.poll()
    tier.end(key(1))
    bench.lower.close(5)
    bench.at_rest()
    bench.lower.offer(bench.stored(2))
    began = time.monotonic()
    bench.lower.close(0.1)
    assert time.monotonic() - began < 10


class Told(Trace):
    """What spans say, in the order in which they end: (name, fault, attributes)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, dict[str, object]]] = []

    def begin(self, name: str, **attributes: object) -> Span:
        told = self.spans
        whole = self

        class Kept(Span):
            ended = False

            @property
            def trace(self) -> Trace:
                return whole

            def end(self, fault: str = "", **more: object) -> None:
                if not self.ended:
                    told.append((name, fault, {**attributes, **more}))
                self.ended = True

        return Kept()


def test_every_job_of_a_tier_is_a_span_in_the_trace_of_the_request_that_caused_it() -> None:
    near, far = Slow(key(1)), Slow(key(2))
    bench = Bench(near, far)
    trace = Told()
    assert bench.lower.fetch("r", wants(1, 2, 3), 10, trace)
    bench.lower.poll()
    near.end(key(1))
    far.end(key(2), FAILED)
    assert not bench.lower.fetch("r", [], 10)
    bench.lower.release("r")
    job = {"keys": 1, "bytes": 100, "outcome": "ok=1"}
    assert trace.spans == [
        ("lmcache.tier.lookup", "", {"tier": "disk", "keys": 3, "outcome": "ok=1,miss=2", "bytes": 0}),
        ("lmcache.tier.lookup", "", {"tier": "remote", "keys": 2, "outcome": "ok=1,miss=1", "bytes": 0}),
        ("lmcache.tier.load", "", {"tier": "disk", **job}),
        ("lmcache.tier.load", "failed=1", {"tier": "remote", "keys": 1, "bytes": 0, "outcome": "failed=1"}),
        ("lmcache.fetch", "", {"chunks": 3, "tokens": 192, "found": 2, "came": 1}),
    ]
    trace.spans.clear()
    bench.lower.offer(bench.stored(4), trace)
    bench.lower.poll()
    near.end(key(4))
    far.end(key(4), LATE)
    bench.lower.poll()
    assert trace.spans == [
        ("lmcache.tier.store", "", {"tier": "disk", **job}),
        ("lmcache.tier.store", "late=1", {"tier": "remote", "keys": 1, "bytes": 0, "outcome": "late=1"}),
    ]
    bench.at_rest()
