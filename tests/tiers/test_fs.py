"""A folder that several engines share: they find each other's objects and never harm each other."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import Kind, Outcome, Runner, open_tier
from lmcache_ext.tiers.disk import FORSAKEN
from lmcache_ext.tiers.fs import Share
from tests.tiers.helpers import WHOLE, chunk, end, found, gb, key, load, over, store, until

ROOT = Path(__file__).parents[2]

ENGINE = """
import random, sys, time
from pathlib import Path
from lmcache_ext.tiers import Kind, Options, Outcome, Runner
from lmcache_ext.tiers.fs import Share
from tests.tiers.helpers import blank, chunk, content, key
folder, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
tier = Runner(Share([folder], shared=True), Options(capacity_gb=40 * 20480 / 2**30, store_queue=500), "engine")
dice, wanted, chunks = random.Random(seed), {}, {i: chunk(i) for i in range(60)}
until = time.monotonic() + seconds
while time.monotonic() < until or wanted:
    if time.monotonic() < until and len(wanted) < 30:
        i = dice.randrange(60)
        if dice.random() < 0.45:
            wanted[tier.submit_store([key(i)], [chunks[i]])] = None
        elif dice.random() < 0.9:
            parts = blank()
            wanted[tier.submit_load([key(i)], [parts])] = i, parts
        else:
            wanted[tier.delete([key(i)])] = None
    tier.wait(0.001)
    for result in tier.poll():
        load = wanted.pop(result.job)
        if load and result.outcomes[0] is Outcome.OK:
            assert content(load[1]) == content(chunks[load[0]]), "wrong bytes"
        assert result.outcomes[0] not in (Outcome.CORRUPT, Outcome.FOREIGN, Outcome.FAILED, Outcome.OFF), result
counts = tier.counts()
assert tier.close(5)
sys.stdout.write(f"{counts.of(Kind.LOAD, Outcome.OK)} {counts.of(Kind.STORE, Outcome.OK)}")
"""


def engine(folder: Path, seed: int, seconds: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", ENGINE, str(folder), str(seed), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


@contextmanager
def share(folder: Path, **options: object) -> Iterator[Runner]:
    tier = over(Share([folder], shared=True), **options)
    yield tier
    assert tier.close(10)


def test_two_engines_find_what_the_other_stores_and_miss_what_it_deletes(tmp_path: Path) -> None:
    with share(tmp_path) as one, share(tmp_path) as two:
        store(one, 1), store(two, 2)
        assert found(two, 1, 2, 3) == [True, True, False] == found(one, 1, 2, 3)
        assert load(two, 1) is Outcome.OK and load(one, 2) is Outcome.OK
        end(one, one.delete([key(1)]))
        assert load(two, 1) is Outcome.MISS and found(two, 1) == [False]
        store(two, 1)
        assert load(one, 1) is Outcome.OK
        assert one.check() == [] and two.check() == []


def test_processes_that_store_load_delete_and_evict_at_once_see_no_fault(tmp_path: Path) -> None:
    """Each asserts that every byte is right and that nothing but hits, misses and lack of room ever comes back."""
    engines = [engine(tmp_path, seed, 2.0) for seed in (1, 2)]
    victim = engine(tmp_path, 3, 60.0)
    time.sleep(random.Random(0).uniform(1.0, 1.5))
    victim.send_signal(signal.SIGKILL)
    victim.communicate(timeout=10)
    for process in engines:
        said, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        loads, stores = map(int, said.split())
        assert loads > 20 and stores > 20, "the test tests nothing"
    with share(tmp_path) as tier:
        there = [i for i in range(60) if tier.index.knows(key(i))]
        assert there and {load(tier, i) for i in there} == {Outcome.OK}
        assert not [fault for fault in tier.check() if ".tmp" not in fault]


def test_another_hosts_unlocked_temporary_file_stays_until_it_is_old(tmp_path: Path) -> None:
    with share(tmp_path) as tier:
        young, old = tmp_path / "00" / "aa.1-2-3.tmp", tmp_path / "00" / "bb.1-2-3.tmp"
        for path in (young, old):
            path.write_bytes(b"x")
        os.utime(old, (time.time() - FORSAKEN - 60,) * 2)
        tier.check(fix=True)
        assert young.exists() and not old.exists()


def test_each_engine_bounds_what_it_knows(tmp_path: Path) -> None:
    with share(tmp_path, capacity_gb=gb(5 * WHOLE)) as one, share(tmp_path, capacity_gb=gb(50 * WHOLE)) as two:
        for i in range(10):
            store(one, i)
        assert one.counts().used == 5 * WHOLE
        assert found(two, *range(10)) == [False] * 5 + [True] * 5
        for i in range(20, 30):
            store(two, i)
        assert found(two, *range(20, 30)) == [True] * 10, "one's bound took what it does not know"


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[None]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(command, timeout=10, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=10, check=True)


def test_a_mount_that_comes_back_as_another_device_is_used_again() -> None:
    folder = Path(tempfile.mkdtemp(prefix="lmcache-ext-share-"))
    try:
        with mounted(folder, 4):
            tier = over(Share([folder], shared=True), faults=2, cooldown_max=0.1)
            store(tier, 1)
            held = os.open(folder, os.O_RDONLY)  # or the next mount may get the same device number
        assert [store(tier, i) for i in (2, 3, 4)] == [Outcome.FAILED, Outcome.FAILED, Outcome.OFF]
        with mounted(folder, 4):
            time.sleep(0.3)
            assert store(tier, 5) is Outcome.OFF and not list(folder.iterdir()), "it wrote into a strange folder"
            for i in range(256):
                (folder / f"{i:02x}").mkdir()
            until(lambda: store(tier, 6) is Outcome.OK)
            assert load(tier, 6) is Outcome.OK
            assert tier.close(5)
        os.close(held)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("url", ["fs://", "fs:///", "fs:///a,/b", "fs://host:9000"])
def test_an_address_without_one_folder_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="one absolute folder"):
        open_tier(url)


def test_upstreams_form_with_a_host_opens_the_folder(tmp_path: Path) -> None:
    tier = open_tier(f"fs://host:9000{tmp_path}/kv", lookup_timeout=5)
    assert store(tier, 1) is Outcome.OK and (tmp_path / "kv" / "01" / key(1).hex()).exists()
    assert isinstance(tier, Runner) and tier.medium.shared and tier.counts().of(Kind.STORE, Outcome.OK) == 1
    assert tier.close(5)
    tier = open_tier(f"fs://{tmp_path}/kv?odirect=0&shared=0", lookup_timeout=5)
    assert isinstance(tier, Runner) and not tier.medium.shared
    assert end(tier, tier.lookup([key(1)])).ok == [True] and load(tier, 1) is Outcome.OK
    assert len(chunk(1)) == 2 and tier.close(5)
