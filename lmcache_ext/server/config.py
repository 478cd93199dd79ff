"""How a server is started: upstream's flags, checked."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from lmcache_ext.config.memory import require_pool_fits
from lmcache_ext.errors import ConfigError
from lmcache_ext.policies import POLICIES
from lmcache_ext.server.adapters import Adapter
from lmcache_ext.server.memory import GIB, MIB, extent_for

TOKEN = "LMCACHE_SERVER_TOKEN"
"""The environment's variable with the secret that HTTP requests must bring (Authorization: Bearer …)."""


@dataclass(frozen=True)
class ServerConfig:
    """Frozen and checked once. Raises ConfigError that names the flag."""

    l1_size_gb: float
    host: str = "localhost"
    port: int = 5555
    http_host: str = "127.0.0.1"
    http_port: int = 8080
    eviction_policy: str = "LRU"
    l1_use_lazy: bool = True
    chunk_size: int = 256
    extent_mb: float = 0.0  # 0: by the size of the memory
    silence_seconds: float = 5.0
    instance_id: str = ""
    adapters: tuple[Adapter, ...] = ()
    token: str = ""

    def __post_init__(self) -> None:
        if not is_loopback(self.host):
            raise ConfigError(
                "--host", self.host, "clients map the server's memory, so they are on this host: 127.0.0.1"
            )
        if not is_loopback(self.http_host) and not self.token:
            raise ConfigError("--http-host", self.http_host, f"listens beyond this host only with a secret in {TOKEN}")
        for flag, port in (("--port", self.port), ("--http-port", self.http_port)):
            if not 0 <= port <= 65535:
                raise ConfigError(flag, port, "must be 0 (any that is free) to 65535")
        if self.policy not in POLICIES:
            raise ConfigError("--eviction-policy", self.eviction_policy, f"must be one of {', '.join(POLICIES)}")
        if not self.l1_size_gb * GIB >= 16 * MIB:
            raise ConfigError("--l1-size-gb", self.l1_size_gb, "must be 0.016 (16 MiB) or more")
        require_pool_fits(self.l1_size_gb, 1, "--l1-size-gb")
        if not 1 <= self.chunk_size <= 1 << 20:
            raise ConfigError("--chunk-size", self.chunk_size, "must be 1 to 1048576 tokens")
        if self.silence_seconds <= 0:
            raise ConfigError("--silence-seconds", self.silence_seconds, "must be greater than 0")
        if self.extent_mb and not MIB <= self.extent_mb * MIB <= self.nbytes:
            raise ConfigError("--extent-mb", self.extent_mb, "must be 1 or more, and at most the memory")

    @property
    def policy(self) -> str:
        """Our name of the policy. Shares of salts hold under each of ours, so upstream's IsolatedLRU is LRU."""
        return "LRU" if self.eviction_policy.lower() == "isolatedlru" else self.eviction_policy

    @property
    def address(self) -> str:
        """Where clients reach it."""
        host = "127.0.0.1" if self.host == "localhost" else self.host
        return f"tcp://[{host}]:{self.port}" if ":" in host else f"tcp://{host}:{self.port}"

    @property
    def extent_bytes(self) -> int:
        """Bytes of an extent, in whole MiB."""
        return int(self.extent_mb) * MIB if self.extent_mb else max(extent_for(self._size) // MIB, 1) * MIB

    @property
    def nbytes(self) -> int:
        """Bytes of the segment: whole extents."""
        return self._size // self.extent_bytes * self.extent_bytes

    @property
    def _size(self) -> int:
        return int(self.l1_size_gb * GIB)


def is_loopback(host: str) -> bool:
    """Whether only this host can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
