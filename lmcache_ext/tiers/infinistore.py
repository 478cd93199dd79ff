"""InfiniStore (`infinistore://host:port`): refused, because we could not run it and ship nothing untested.

docs/tiers.md has what its server says.
"""

from __future__ import annotations

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.medium import MEDIA, Medium
from lmcache_ext.tiers.urls import Address


@MEDIA.register("infinistore")
class InfiniStore(Medium):
    """No medium: only the refusal."""

    @classmethod
    def from_address(cls, address: Address) -> InfiniStore:
        """Raises ConfigError."""
        why = "is not supported: InfiniStore's server (0.2.35) starts only on a machine with an RDMA device, also for"
        raise ConfigError(
            "url", address.shown, f"{why} clients over TCP, so nothing could be tested; see docs/tiers.md"
        )
