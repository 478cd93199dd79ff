"""How a scheduler finds its workers' pools: one small file per rank, named by the engine's id.

The pools themselves are memfds. A file is written before the worker says that it is ready, read by whoever needs it,
and removed by the scheduler once it has read all; files whose process is gone are swept at start.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lmcache_ext.errors import LMCacheError
from lmcache_ext.transfer.pages import Cut
from lmcache_ext.transfer.pool import Shape

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Berth:
    """Where one rank's pool lies and how it is divided."""

    rank: int
    pid: int
    path: str  # of the memfd
    slots: int
    blocks_per_slot: int
    row_bytes: int
    layout: str  # PageTable.layout
    cuts: tuple[Cut, ...] = ()  # PageTable.cuts
    gpu: int | None = None  # whose memory the slots are in; None: in the segment
    address: int = 0  # there, in the process `pid`

    @property
    def shape(self) -> Shape:
        """As a pool wants it."""
        return Shape(self.slots, self.blocks_per_slot, self.row_bytes)


def runtime_dir() -> Path:
    """A folder of this user's alone: `LMCACHE_RUNTIME_DIR`, or one in the temporary directory.

    Raises:
        LMCacheError: it can't be made, or it belongs to somebody else.
    """
    path = Path(os.environ.get("LMCACHE_RUNTIME_DIR") or Path(tempfile.gettempdir()) / f"lmcache_ext-{os.getuid()}")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = path.stat().st_uid
    except OSError as error:
        raise LMCacheError(f"LMCACHE_RUNTIME_DIR={str(path)!r}: {error.strerror}; name a folder we can write") from None
    if owner != os.getuid() or not os.access(path, os.W_OK | os.X_OK):
        raise LMCacheError(f"LMCACHE_RUNTIME_DIR={str(path)!r}: not ours to write; name a folder of this user's")
    return path


def publish(engine_id: str, berth: Berth) -> Path:
    """Tell the scheduler of `engine_id` where this rank's pool is."""
    sweep()
    path = _path(engine_id, berth.rank)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(berth)))
    partial.replace(path)
    return path


def find(engine_id: str, rank: int, timeout: float) -> Berth | None:
    """Rank `rank`'s pool, or None if it was not published within `timeout` seconds."""
    path, deadline = _path(engine_id, rank), time.monotonic() + timeout
    while True:
        if path.exists():
            said = json.loads(path.read_text())
            return Berth(**{**said, "cuts": tuple(Cut(*each) for each in said["cuts"])})
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_SECONDS)


def retract(engine_id: str, ranks: int) -> None:
    """Everybody has read: remove the files of `engine_id`."""
    for rank in range(ranks):
        _path(engine_id, rank).unlink(missing_ok=True)


def sweep() -> int:
    """Remove files of processes that are gone. Returns how many."""
    swept = 0
    for path in runtime_dir().glob("*.pool"):
        try:
            pid = int(json.loads(path.read_text())["pid"])
        except (OSError, ValueError, KeyError):
            continue
        if not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
            swept += 1
    return swept


def _path(engine_id: str, rank: int) -> Path:
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in engine_id)
    return runtime_dir() / f"{safe}.{rank}.pool"
