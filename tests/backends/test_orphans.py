"""A process that watches its worker ends when the worker is killed, one way or the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dynamo_lmcache.vllm import orphans

CHILD = """
import signal, sys, time
from dynamo_lmcache.vllm import orphans
if "stubborn" in sys.argv:
    orphans._GRACE_S = 0.5
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
orphans.register()
print("watching", flush=True)
time.sleep(60)
"""


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait(10)


def watching(pid: int, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, orphans.WORKER_PID: str(pid)}
    child = subprocess.Popen([sys.executable, "-c", CHILD, *words], stdout=subprocess.PIPE, text=True, env=env)
    assert child.stdout is not None and child.stdout.readline() == "watching\n"
    child.stdout.close()
    return child


@pytest.mark.parametrize(("words", "by"), [((), signal.SIGTERM), (("stubborn",), signal.SIGKILL)])
def test_it_ends_with_the_worker(worker: subprocess.Popen[bytes], words: tuple[str, ...], by: signal.Signals) -> None:
    child = watching(worker.pid, *words)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    worker.kill()
    worker.wait(10)
    assert child.wait(20) == -by


def test_a_worker_that_is_gone_already(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait(10)
    env = {**os.environ, orphans.WORKER_PID: str(worker.pid)}
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, timeout=20)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("said", [None, "", "nobody"])
def test_without_a_worker_nothing_is_watched(monkeypatch: pytest.MonkeyPatch, said: str | None) -> None:
    monkeypatch.delenv(orphans.WORKER_PID, raising=False)
    if said is not None:
        monkeypatch.setenv(orphans.WORKER_PID, said)
    orphans.register()
    assert os.getpid() not in orphans._watched


def test_the_worker_does_not_watch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(orphans.WORKER_PID, "")  # taken back afterwards
    orphans.adopt()
    orphans.register()
    assert os.environ[orphans.WORKER_PID] == str(os.getpid()) and os.getpid() not in orphans._watched
