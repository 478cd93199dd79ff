"""Who leaves first. One registry, one class per policy; `policies/base.py` is the contract."""

from lmcache_ext.policies import arc, fifo, lfu, lru, mru, s3fifo
from lmcache_ext.policies.base import POLICIES, EvictionPolicy

__all__ = ["POLICIES", "EvictionPolicy", "arc", "fifo", "lfu", "lru", "mru", "s3fifo"]
