"""Resets of vLLM's prefix cache: it can't be reset while a block is in use, and some callers then raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmcache_ext.integration.vllm.log import get_logger

logger = get_logger("scheduler")


def before_each(pool: Any, give_way: Callable[[], None]) -> None:
    """Have `give_way` called whenever the block pool is to be reset, before it looks who uses it."""
    reset = pool.reset_prefix_cache

    def reset_prefix_cache() -> bool:
        try:
            give_way()
        except Exception:
            logger.exception("blocks could not be given back before a reset of the prefix cache")
        return bool(reset())

    pool.reset_prefix_cache = reset_prefix_cache
