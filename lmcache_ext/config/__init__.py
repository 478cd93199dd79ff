"""Settings: what they are, where they come from, and what is refused."""

from lmcache_ext.config.memory import GIB, default_pool_gb, memory_available, require_pool_fits
from lmcache_ext.config.pd import Handover, Listen, handover, no_gpu_buffer, pool_gb
from lmcache_ext.config.settings import EngineConfig, load_config

__all__ = [
    "GIB",
    "EngineConfig",
    "Handover",
    "Listen",
    "default_pool_gb",
    "handover",
    "load_config",
    "memory_available",
    "no_gpu_buffer",
    "pool_gb",
    "require_pool_fits",
]
