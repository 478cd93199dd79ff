"""Who leaves first. One registry, one class per policy; `policies/base.py` is the contract."""

from lmcache_ext.policies import lru
from lmcache_ext.policies.base import POLICIES, EvictionPolicy

__all__ = ["POLICIES", "EvictionPolicy", "lru"]
