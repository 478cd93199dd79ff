"""TCP ports for those who have not been given one."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

_FIRST, _LAST = 20000, 32767  # Dynamo reads one of them as a signed number of 16 bits
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody had a moment ago, and that this function gives once in a process.

    Not one of those that the kernel gives to outgoing connections, if it can be helped: an engine uses its ports half a
    minute after it has chosen them.

    Raises:
        OSError: none is left.
    """
    for port in random.sample(range(_FIRST, _last() + 1), min(500, _last() + 1 - _FIRST)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            if port not in _given:
                probe.bind(("", port))
                _given.add(port)
                return port
    raise OSError(f"no TCP port of {_FIRST} to {_last()} is free")


def _last() -> int:
    """The last before the kernel's own, unless that leaves too few."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _LAST
    return min(_LAST, first - 1) if first > _FIRST + 1000 else _LAST
