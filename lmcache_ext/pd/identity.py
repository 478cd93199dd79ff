"""Which process a peer is, on which machine, and proof of its end."""

from __future__ import annotations

import os
from pathlib import Path

from lmcache_ext import processes
from lmcache_ext.pd.wire import Identity


def own() -> Identity:
    """This process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pid = os.getpid()
    return Identity(boot, Path("/proc/self/ns/pid").stat().st_ino, pid, processes.started(pid) or 0)


def same_machine(peer: Identity) -> bool:
    """Whether `peer`'s pid means the same process here as there."""
    here = own()
    return (peer.boot, peer.space) == (here.boot, here.space)


def watch(peer: Identity) -> int | None:
    """A pidfd of `peer`, which the caller closes; None if it has ended.

    Raises:
        OSError: it may be alive, but can't be watched.
    """
    try:
        return processes.watch(peer.pid, peer.start)
    except ProcessLookupError:
        return None
