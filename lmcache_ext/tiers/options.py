"""How a tier behaves, whatever it is made of."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lmcache_ext.errors import ConfigError
from lmcache_ext.policies import POLICIES

GB = 1 << 30


@dataclass(frozen=True)
class Options:
    """Frozen and checked once; a bad value raises ConfigError. Each can be given in a tier's URL under its name."""

    capacity_gb: float | None = None
    """GB (2^30 bytes) that objects may take, headers and rounding included; None: no bound"""
    policy: str = "LRU"
    """who leaves first, a name from `lmcache_ext.policies`"""
    threads: int = 8
    """threads that do I/O; stores use all but one of them"""
    store_queue: int = 64
    """keys of stores, waiting or under way, beyond which stores are refused"""
    load_queue: int = 1024
    """the same for loads, look-ups that need I/O, and deletions, each"""
    lookup_timeout: float = 0.05
    """seconds until the deadline of a job, unless the job names its own"""
    load_timeout: float = 10.0
    store_timeout: float = 10.0
    delete_timeout: float = 10.0
    ttl: float = 0.0
    """seconds until an object expires; 0: never"""
    faults: int = 5
    """faults in a row that open a breaker"""
    cooldown: float = 1.0
    """seconds until an open breaker is probed for the first time; doubles up to `cooldown_max`"""
    cooldown_max: float = 60.0
    serde: str = "naive"
    """what is done to chunks on their way, serde.py: `naive`, or some of `fp8,aesgcm`"""
    serde_dtype: str = ""
    """the KV's numbers, for `fp8`: bf16 or fp16"""
    serde_key_file: str = ""
    """for `aesgcm`: a file with 64 hexadecimal digits"""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError("policy", self.policy, f"must be one of {', '.join(POLICIES)}")
        positive = {field.name for field in fields(self) if field.type in ("int", "float")} - {"ttl"}
        for name in sorted(positive):
            if not getattr(self, name) > 0:
                raise ConfigError(name, getattr(self, name), "must be greater than 0")
        if self.capacity_gb is not None and not self.capacity_gb > 0:
            raise ConfigError("capacity_gb", self.capacity_gb, "must be greater than 0; leave it out for no bound")
        if not self.ttl >= 0:
            raise ConfigError("ttl", self.ttl, "must be seconds, or 0 for never")

    @property
    def capacity(self) -> int | None:
        """Bytes."""
        return None if self.capacity_gb is None else int(self.capacity_gb * GB)
