"""Processes that tests stand still, and what state they are in."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def state_of(pid: int) -> str:
    """R, S, T (stopped), Z (dead), …"""
    return _state(Path(f"/proc/{pid}/stat"))


def freeze(pid: int) -> None:
    """SIGSTOP, which takes effect a little later: returns once no thread of the process runs any more."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 15
    while any(map(_runs, Path(f"/proc/{pid}/task").glob("*/stat"))):
        assert time.monotonic() < deadline, f"{pid} does not stop"
        time.sleep(0.001)


def send(pid: int, number: int) -> None:
    """A signal; one that stops has taken effect when this returns."""
    if number == signal.SIGSTOP:
        freeze(pid)
    else:
        os.kill(pid, number)


def _runs(stat: Path) -> bool:
    try:
        return _state(stat) not in "TZX"
    except (FileNotFoundError, ProcessLookupError):  # the thread has ended
        return False


def _state(stat: Path) -> str:
    return stat.read_text().rpartition(")")[2].split()[0]
