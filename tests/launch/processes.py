"""Processes of a test, found by a variable in their environment, and ports for them."""

from __future__ import annotations

import signal
import socket
from pathlib import Path


def listens(port: int) -> bool:
    """Whether something accepts connections there on loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def running_with(assignment: str) -> list[str]:
    """Pid and command line of every process that has NAME=VALUE in its environment."""
    found = (_describe(entry, assignment.encode()) for entry in Path("/proc").glob("[0-9]*"))
    return [text for text in found if text]


def _describe(entry: Path, assignment: bytes) -> str:
    try:
        if assignment not in (entry / "environ").read_bytes().split(b"\0"):
            return ""
        return f"{entry.name} " + (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:  # gone meanwhile, or another user's
        return ""


def heed_sigint() -> None:
    """For preexec_fn: a pytest that runs in a shell's background would pass on that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
