"""`lmcache-ext check`: which faults it finds, what it says and does about them, and that it harms nothing."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmcache_ext.cli.main import main
from lmcache_ext.tiers import Outcome, open_tier
from lmcache_ext.tiers.header import BLOCK
from tests.static.rules import ROOT
from tests.tiers.helpers import chunk, key, load, memory, store, until
from tests.tiers.redis_servers import Server

THREADS, PART = 4, 1 << 20
WRITER = f"""
import mmap, random, sys
from lmcache_ext.tiers import open_tier
tier = open_tier(sys.argv[1], threads={THREADS}, store_queue=64)
part = memoryview(mmap.mmap(-1, {PART}))
for i in range(int(sys.argv[2]), 10**6):
    tier.submit_store([i.to_bytes(32, "little")], [[part, part]])
    tier.wait(0.001)
    if any(all(result.ok) for result in tier.poll()):
        sys.stdout.write("x"), sys.stdout.flush()
"""


def temporary(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def test_writers_killed_in_a_loop_leave_what_is_documented_and_fix_removes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, url = random.Random(0), f"file://{tmp_path}/"
    leftovers = 0
    for turn in range(5):
        command = [sys.executable, "-c", WRITER, url, str(1000 * turn)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.read(1 + rng.randrange(6))
            time.sleep(rng.random() * 0.01)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=10)
        there = temporary(tmp_path)
        leftovers += len(there)
        assert main(["check", url]) == bool(there)
        *faults, summary = capsys.readouterr().out.splitlines()
        assert sorted(faults) == sorted(f"{path} was left by a writer that ended: --fix removes it" for path in there)
        assert len(there) <= THREADS and f"{len(there)} faults" in summary
        assert temporary(tmp_path) == there, "it changed something without --fix"
        if turn % 2:  # else the next turn finds what two have left: a tier that starts removes it itself
            assert main(["check", url, "--fix"]) == 0
            assert not temporary(tmp_path) and capsys.readouterr().out.count(": mended") == len(there)
            assert main(["check", url]) == 0 and ", 0 faults" in capsys.readouterr().out
    assert leftovers, "the test tests nothing"
    objects = [int.from_bytes(bytes.fromhex(path.name), "little") for path in tmp_path.glob("*/*") if not path.suffix]
    tier = open_tier(url)
    into = memory(PART, PART)
    assert len(objects) >= 5 and {load(tier, i, into) for i in objects} == {Outcome.OK}
    assert tier.close(5)


def test_each_fault_has_its_sentence_and_its_fate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{tmp_path}/?capacity_gb=0.00001"
    tier = open_tier(f"file://{tmp_path}/")
    for i in (1, 2):
        store(tier, i)
    assert tier.close(5)
    (tmp_path / "02" / ("02" * 32)).write_bytes(b"stub")
    (tmp_path / "02" / "notes.txt").write_text("mine")
    assert main(["check", url]) == 1
    out = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(" ")[2] for line in out[:2]) == [
        "is cut off within its header: --fix removes it", "is not ours: stays, for it may be somebody's"
    ]  # fmt: skip
    assert out[2].endswith("2 objects, 2 faults"), "the capacity in the URL made something leave"
    assert main(["check", url, "--fix", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["objects"], len(told["faults"]), len(told["left"])) == (False, 2, 2, 1)
    assert (tmp_path / "02" / "notes.txt").exists() and not (tmp_path / "02" / ("02" * 32)).exists()
    (tmp_path / "02" / "notes.txt").unlink()
    assert main(["check", url]) == 0


def test_a_living_writers_file_stays(tmp_path: Path) -> None:
    """While an engine works, also with --fix."""
    url = f"file://{tmp_path}/"
    with subprocess.Popen([sys.executable, "-c", WRITER, url, "0"], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(1)
        for _ in range(3):
            assert main(["check", url, "--fix"]) == 0
            before = len(process.stdout.read(3))
            assert before == 3, "its stores fail"
        process.kill()
        process.wait(timeout=10)


def test_a_server_of_redis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path / "redis")
    try:
        url = f"redis://127.0.0.1:{server.port}"
        tier = open_tier(url, lookup_timeout=5.0)
        store(tier, 1, chunk(1))
        assert tier.close(5) and main(["check", url]) == 0
        server.client().set("kvc:1:strange", b"x")
        assert main(["check", url, "--fix"]) == 1
        assert "'kvc:1:strange' is not ours: stays" in capsys.readouterr().out.replace("b'", "'")
        assert server.client().exists("kvc:1:strange", f"kvc:1:{key(1).hex()}") == 2
    finally:
        server.stop()
    until(lambda: server.process.poll() is not None)
    assert main(["check", url]) == 1 and "can't be read: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file:///no/such/folder", "/no/such/folder lacks the subfolders"),
        ("tape:///x", "known: example"),
        ("/mnt/kv", "must be scheme://location"),
        ("example://?colour=red", "not a parameter"),
    ],
)
def test_a_wrong_url_is_refused_and_makes_nothing(url: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", url]) == 2
    assert why in capsys.readouterr().err and not Path("/no").exists()
    assert BLOCK == 4096
