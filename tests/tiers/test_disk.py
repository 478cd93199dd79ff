"""The disk tier: killed writers, full, read-only and lost disks, several engines on one folder, many objects."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_ext.tiers import Faults, Kind, Options, Outcome, Runner
from lmcache_ext.tiers.disk import Disk
from lmcache_ext.tiers.header import BLOCK
from tests.tiers.helpers import (
    WHOLE,
    blank,
    chunk,
    content,
    end,
    found,
    gb,
    header_of,
    key,
    load,
    over,
    store,
    until,
)

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def disk(*folders: Path, odirect: bool = True, shared: bool = False, **options: object) -> Iterator[Runner]:
    tier = over(Disk(folders, odirect, shared=shared), **options)
    yield tier
    assert tier.close(10)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def bytes_in(folder: Path) -> int:
    """What the folder's files take, those included that vanish while we look."""
    total = 0
    for path in files(folder):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


@contextlib.contextmanager
def mounted(*what: str) -> Iterator[Path]:
    """A mount of its own, for which root is needed; not in pytest's folders, whose removal it would break if we die."""
    folder = Path(tempfile.mkdtemp(prefix="lmcache-ext-mount-"))
    made = subprocess.run(["mount", *what, str(folder)], timeout=10, check=False)
    try:
        if made.returncode:
            pytest.skip("mounting is not allowed here")
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=10, check=False)
        folder.rmdir()


def small(megabytes: int) -> contextlib.AbstractContextManager[Path]:
    """A file system of that size, in memory."""
    return mounted("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs")


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odirect", [True, False])
def test_an_object_is_its_header_and_its_parts(tmp_path: Path, odirect: bool) -> None:
    with disk(tmp_path, odirect=odirect) as tier:
        store(tier, 1)
        (path,) = files(tmp_path)
        assert path == tmp_path / "01" / key(1).hex()
        assert path.read_bytes() == bytes(header_of(key(1), chunk(1))) + content(chunk(1))


def test_o_direct_is_used_where_it_is_granted_and_parts_are_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    real = os.open
    with disk(tmp_path) as tier:
        if not tier.medium._direct[tmp_path]:
            pytest.skip("this file system does not grant O_DIRECT")
        monkeypatch.setattr(os, "open", lambda path, flag, mode=0o777: (flags.append(flag), real(path, flag, mode))[1])
        assert store(tier, 1) is Outcome.OK and load(tier, 1) is Outcome.OK
        assert [bool(flag & os.O_DIRECT) for flag in flags] == [True, True]
        flags.clear()
        odd = [memoryview(bytearray(8193))[1:]]
        assert store(tier, 2, odd) is Outcome.OK and load(tier, 2, odd) is Outcome.OK
        assert [bool(flag & os.O_DIRECT) for flag in flags] == [False, False]
        assert load(tier, 1) is Outcome.OK


def test_an_odd_size_counts_in_whole_blocks(tmp_path: Path) -> None:
    with disk(tmp_path) as tier:
        store(tier, 1, chunk(1, 5000, 1))
        assert tier.counts().used == BLOCK + 8192 == bytes_in(tmp_path)


def test_reading_by_the_page_cache_what_o_direct_wrote_and_the_other_way_round(tmp_path: Path) -> None:
    for first, then in ((True, False), (False, True)):
        with disk(tmp_path / str(first), odirect=first) as tier:
            store(tier, 1)
        with disk(tmp_path / str(first), odirect=then) as tier:
            assert found(tier, 1) == [True] and load(tier, 1) is Outcome.OK


def test_a_folder_more_leaves_what_is_there_where_it_is(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with disk(a) as tier:
        for i in range(20):
            store(tier, i)
    with disk(b, a) as tier:
        assert found(tier, *range(20)) == [True] * 20
        assert [load(tier, i) for i in range(20)] == [Outcome.OK] * 20
        for i in range(20, 40):
            store(tier, i)
        assert 3 < len(files(b)) < 17 and len(files(a)) + len(files(b)) == 40
        assert tier.check() == []
        end(tier, tier.delete([key(i) for i in range(40)]))
        assert files(tmp_path) == []


# -- start again ------------------------------------------------------------------------------------------------------


def test_a_restart_finds_what_was_there_oldest_first(tmp_path: Path) -> None:
    with disk(tmp_path) as tier:
        for i in range(5):
            store(tier, i)
    for i, age in enumerate((10, 50, 30, 40, 20)):
        os.utime(tmp_path / f"{i:02x}" / key(i).hex(), (time.time() - age,) * 2)
    with disk(tmp_path, capacity_gb=gb(3 * WHOLE)) as tier:
        assert found(tier, *range(5)) == [True, False, True, False, True]
        assert tier.counts().used == 3 * WHOLE == bytes_in(tmp_path)
        assert tier.check() == []


def test_while_the_scan_runs_loads_and_lookups_are_served_and_stores_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(tmp_path) as tier:
        for i in range(4):
            store(tier, i)
    go_on = threading.Event()
    real = Disk.scan

    def slow(self: Disk, sweep: bool, faults: list[str]) -> Iterator[object]:
        for each in real(self, sweep, faults):
            yield each
            go_on.wait(timeout=20)

    monkeypatch.setattr(Disk, "scan", slow)
    tier = Runner(Disk([tmp_path]), Options(lookup_timeout=5, faults=1), "test")
    assert found(tier, 3, 2, 9) == [True, True, False] and not tier.scanned
    assert load(tier, 1) is Outcome.OK
    job = tier.submit_store([key(9)], [chunk(9)], timeout=20)
    assert not tier.wait(0.1), "it was stored though it is not known how much is there"
    late = end(tier, tier.submit_store([key(8)], [chunk(8)], timeout=0.05))
    assert late.outcomes == (Outcome.LATE,) and tier.counts().trips == 0
    go_on.set()
    assert end(tier, job).ok == [True]
    assert found(tier, *range(4), 9, 8) == [True] * 5 + [False]
    until(lambda: tier.check() == [])
    assert tier.close(5)


WRITER = """
import sys
from pathlib import Path
from lmcache_ext.tiers import Options, Runner
from lmcache_ext.tiers.disk import Disk
from tests.tiers.helpers import chunk, end, key
tier = Runner(Disk([Path(sys.argv[1])], odirect=sys.argv[2] == "1"), Options(capacity_gb=0.002, store_queue=500), "w")
for i in range(int(sys.argv[3]), 10**6):
    tier.submit_store([key(i)], [chunk(i)])
    tier.wait(0.001)
    tier.poll()
    if i % 10 == 5:
        sys.stdout.write("x"), sys.stdout.flush()
"""


def writer(folder: Path, odirect: bool, first: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(folder), str(int(odirect)), str(first)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


@pytest.mark.parametrize("odirect", [True, False])
def test_a_writer_killed_at_any_moment_leaves_nothing_wrong(tmp_path: Path, odirect: bool) -> None:
    rng = random.Random(odirect)
    for turn in range(4):
        first = 1000 * turn
        with writer(tmp_path, odirect, first) as process:
            assert process.stdout is not None
            process.stdout.read(2 + rng.randrange(4))
            time.sleep(rng.random() * 0.01)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=10)
        with disk(tmp_path, capacity_gb=0.002) as tier:
            assert not list(tmp_path.rglob("*.tmp")), "a dead writer's leftovers are still there"
            there = [i for i in range(first, first + 500) if tier.index.knows(key(i))]
            assert len(there) >= 5
            assert {load(tier, i) for i in there} == {Outcome.OK}
            assert bytes_in(tmp_path) == tier.counts().used <= tier.options.capacity
            assert tier.check() == []


def test_leftovers_go_and_a_living_writers_file_stays(tmp_path: Path) -> None:
    with disk(tmp_path):
        pass
    dead, alive = tmp_path / "00" / "aa.1-2-3.tmp", tmp_path / "01" / "bb.1-2-3.tmp"
    stub, strange = tmp_path / "02" / ("02" * 32), tmp_path / "02" / "notes.txt"
    for path in (dead, alive, stub, strange):
        path.write_bytes(b"x" * 100)
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with disk(tmp_path) as tier:
            assert not dead.exists() and not stub.exists() and alive.exists() and strange.exists()
            dead.write_bytes(b"x")
            assert tier.check() == [f"{dead} was left by a writer that ended", f"{strange} is not ours"]
            assert dead.exists()
            tier.check(fix=True)
            assert not dead.exists() and tier.check() == [f"{strange} is not ours"]
            held.close()
            tier.check(fix=True)
            assert not alive.exists(), "its writer ended"


# -- disks that fail --------------------------------------------------------------------------------------------------


def test_a_full_disk_fails_stores_and_nothing_else() -> None:
    with small(2) as folder, disk(folder, faults=3, cooldown=0.2) as tier:
        outcomes = [store(tier, i, chunk(i, 400_000)) for i in range(9)]
        kept = [i for i, outcome in enumerate(outcomes) if outcome is Outcome.OK]
        assert kept == list(range(len(kept))) and Outcome.FAILED in outcomes and outcomes[-1] is Outcome.OFF
        for i in kept:
            into = blank(400_000)
            assert load(tier, i, into) is Outcome.OK and content(into) == content(chunk(i, 400_000))
        assert not list(folder.rglob("*.tmp")), "a failed store left its bytes"
        assert bytes_in(folder) == tier.counts().used
        for path in files(folder)[:2]:
            path.unlink()
        until(lambda: store(tier, 100, chunk(100, 400_000)) is Outcome.OK)
        until(lambda: tier.check() == [])


def test_a_file_size_limit_is_a_failed_store(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with disk(tmp_path) as tier:
        store(tier, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (WHOLE - 4096, hard))
        try:
            assert store(tier, 2) is Outcome.FAILED
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(files(tmp_path)) == 1 and tier.counts().used == WHOLE
        assert store(tier, 2) is Outcome.OK and tier.check() == []


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], timeout=10, check=True)


def test_a_read_only_disk_gives_back_what_it_holds() -> None:
    with small(4) as folder:
        with disk(folder, faults=2) as tier:
            store(tier, 1)
            remount(folder, "ro")
            assert [store(tier, i) for i in (2, 3)] == [Outcome.FAILED] * 2
            assert store(tier, 4) is Outcome.OFF
            assert load(tier, 1) is Outcome.OK
        with disk(folder, faults=1) as tier:
            assert found(tier, 1) == [True] and load(tier, 1) is Outcome.OK
            assert store(tier, 2) is Outcome.FAILED
            remount(folder, "rw")
            until(lambda: store(tier, 2) is Outcome.OK)
            until(lambda: tier.check() == [])


def test_a_lost_mount_is_misses_and_writes_nothing_elsewhere_until_it_is_back() -> None:
    with small(4) as kept:
        with mounted("--bind", str(kept)) as folder:
            tier = over(Disk([folder]), faults=2)
            store(tier, 1), store(tier, 2)
        folder.mkdir()
        try:
            assert load(tier, 1) is Outcome.MISS
            assert [store(tier, i) for i in (3, 4, 5)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
            time.sleep(0.3)
            tier.poll()
            time.sleep(0.1)
            assert store(tier, 6) is Outcome.OFF and list(folder.iterdir()) == []
            subprocess.run(["mount", "--bind", str(kept), str(folder)], timeout=10, check=True)
            try:
                until(lambda: store(tier, 7) is Outcome.OK)
                until(lambda: found(tier, 1, 2, 7) == [True] * 3, 5)
                assert load(tier, 1) is Outcome.OK
                assert tier.close(5)
            finally:
                subprocess.run(["umount", "-l", str(folder)], timeout=10, check=True)
        finally:
            shutil.rmtree(folder)


def test_a_folder_that_was_emptied_fills_again(tmp_path: Path) -> None:
    with disk(tmp_path, faults=2) as tier:
        for i in (1, 2, 3):
            store(tier, i)
        subprocess.run(f"rm -rf {tmp_path}/*", shell=True, timeout=10, check=True)
        assert load(tier, 1) is Outcome.MISS
        until(lambda: store(tier, 4) is Outcome.OK)
        until(lambda: found(tier, 1, 2, 3, 4) == [False, False, False, True] and tier.counts().used == WHOLE)


# -- several engines on one folder ------------------------------------------------------------------------------------


def test_two_engines_on_one_folder(tmp_path: Path) -> None:
    with disk(tmp_path) as one, disk(tmp_path) as two, disk(tmp_path, shared=True) as three:
        store(one, 1), store(two, 2)
        assert found(two, 1, 2) == [False, True], "an engine knows what it wrote or found at its start"
        assert found(three, 1, 2, 3) == [True, True, False], "and with `shared` what is there"
        assert load(three, 2) is Outcome.OK
        store(one, 5), store(two, 5)
        end(one, one.delete([key(5)]))
        assert load(two, 5) is Outcome.MISS and found(two, 5) == [False]
        assert store(two, 5) is Outcome.OK and load(two, 5) is Outcome.OK
        assert three.counts().used == 2 * WHOLE


def test_two_processes_write_and_evict_in_one_folder(tmp_path: Path) -> None:
    with writer(tmp_path, True, 0) as other, disk(tmp_path, capacity_gb=0.002, shared=True) as tier:
        assert other.stdout is not None
        try:
            other.stdout.read(3)
            seen: list[Outcome] = []
            for turn in range(10):
                other.stdout.read(1)
                mine = list(range(turn * 20, turn * 20 + 20))
                seen += [load(tier, i) for i in mine]
                seen += [store(tier, 10**6 + i) for i in mine]
        finally:
            other.kill()
            other.wait(timeout=10)
        assert set(seen) <= {Outcome.OK, Outcome.MISS, Outcome.REFUSED}
        assert seen.count(Outcome.OK) > 200
        assert tier.counts().used <= tier.options.capacity
        tier.check(fix=True)
        assert tier.check() == [] and bytes_in(tmp_path) <= tier.options.capacity


def test_bytes_on_the_disk_never_exceed_the_capacity(tmp_path: Path) -> None:
    capacity = 20 * WHOLE + 5000
    peak, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(timeout=0.001):
            peak[0] = max(peak[0], bytes_in(tmp_path))

    with disk(tmp_path, capacity_gb=gb(capacity), store_queue=500) as tier:
        looking = threading.Thread(target=look)
        looking.start()
        for i in range(200):
            tier.submit_store([key(i)], [chunk(i)])
        until(lambda: tier.wait(0.01) and (tier.poll(), tier.counts().of(Kind.STORE) == 200)[1], 30)
        until(lambda: peak[0] > 10 * WHOLE)  # on a busy machine it may not have looked yet
        done.set()
        looking.join(10)
        assert 10 * WHOLE < peak[0] <= capacity + 4 * WHOLE  # a walk is no snapshot: it may see one come and one go
        assert bytes_in(tmp_path) <= capacity
        assert tier.counts().evicted > 150


# -- many -------------------------------------------------------------------------------------------------------------


def test_many_objects_hold_nobody_up(tmp_path: Path) -> None:
    count = 20_000
    with disk(tmp_path):
        pass
    rng = random.Random(0)
    keys = [rng.randbytes(32) for _ in range(count)]
    header = bytes(BLOCK)
    for k in keys:
        (tmp_path / k.hex()[:2] / k.hex()).write_bytes(header)
    began = time.monotonic()
    tier = Runner(Disk([tmp_path]), Options(), "test")
    result = end(tier, tier.lookup([keys[-1], key(1)], timeout=5))
    assert result.ok == [True, False] and time.monotonic() - began < 3 and not tier.scanned
    until(lambda: tier.scanned, 20)
    assert tier.counts().objects == count and tier.counts().used == count * BLOCK
    assert end(tier, tier.lookup(keys)).leading == count
    assert end(tier, tier.submit_load([keys[0]], [blank(4096)])).outcomes == (Outcome.CORRUPT,)
    assert tier.close(5)


def test_faults_below_the_disk_are_deterministic(tmp_path: Path) -> None:
    def run(folder: Path) -> list[Outcome]:
        tier = over(Disk([folder]), Faults(seed=5, flip=0.3, error=0.2), faults=1000)
        outcomes = [store(tier, i) for i in range(30)] + [load(tier, i) for i in range(30)]
        assert tier.close(5)
        return outcomes

    first = run(tmp_path / "a")
    assert first == run(tmp_path / "b") and len(set(first)) > 2
