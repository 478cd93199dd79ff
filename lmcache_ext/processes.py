"""One process for good: its number and when it began; and a pidfd, which is readable once it can't run any more."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def started(pid: int) -> int | None:
    """When a process began, clock ticks after boot; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # field 22, proc(5); the name before may hold anything


def watch(pid: int, start: int) -> int:
    """A pidfd of the process that began at `start`, which the caller closes.

    Raises:
        ProcessLookupError: it has ended; its number may be another's by now.
        OSError: it may be alive, but can't be watched.
    """
    fd = os.pidfd_open(pid)
    begun = started(pid)  # looked at while the pidfd keeps the number from being given anew
    if begun == start:
        return fd
    os.close(fd)
    raise ProcessLookupError(errno.ESRCH, f"it began at tick {begun}, not {start}")
