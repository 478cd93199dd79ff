"""How much host memory there is, as the cgroup sees it, and how much of it a pool may take."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil

from lmcache_ext.errors import ConfigError

logger = logging.getLogger("lmcache_ext.config")

GIB = 1 << 30
DEFAULT_POOL_GB = 20.0
_CGROUPS = (  # limit, usage, and where the usage is broken down: versions 2 and 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory.stat")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.stat"),
    ),
)


def memory_available() -> int:
    """Bytes that this process may still take: the machine's free memory or the cgroup's, whichever is less."""
    available = int(psutil.virtual_memory().available)
    for files in _CGROUPS:
        left = _cgroup_left(*files)
        if left is not None:
            available = min(available, left)
    return max(available, 0)


def memory_limit() -> int:
    """Bytes that this process could ever have: the machine's memory or the cgroup's limit, whichever is less."""
    total = int(psutil.virtual_memory().total)
    for limit, _, _ in _CGROUPS:
        bound = _number(limit)
        if bound is not None:
            total = min(total, bound)
    return total


def default_pool_gb(workers_on_host: int) -> float:
    """GB for each rank when nothing was asked for: min(20, a quarter of what is left / workers on this host)."""
    return min(DEFAULT_POOL_GB, memory_available() / 4 / max(workers_on_host, 1) / GIB)


def require_pool_fits(gb: float, workers_on_host: int, setting: str) -> None:
    """Raise ConfigError unless pools of `gb` GB for each of this host's workers fit into its memory."""
    need, limit = gb * GIB * max(workers_on_host, 1), memory_limit()
    if need > limit:
        raise ConfigError(
            setting,
            gb,
            f"{workers_on_host} rank(s) would need {need / GIB:.1f} GB, and this host has {limit / GIB:.1f} GB; "
            f"at most {limit / GIB / max(workers_on_host, 1):.1f} would do",
        )


def _cgroup_left(limit: Path, usage: Path, stat: Path) -> int | None:
    """Files that were read and are not in use count as usage, and the kernel drops them before it lacks memory."""
    bound, used = _number(limit), _number(usage)
    return None if bound is None or used is None else bound - used + _inactive_files(stat)


def _inactive_files(stat: Path) -> int:
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return 0
    found = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}
    return found.get("total_inactive_file", found.get("inactive_file", 0))


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
