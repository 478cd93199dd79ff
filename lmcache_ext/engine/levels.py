"""The tiers that the settings name, opened."""

from __future__ import annotations

from collections.abc import Iterable

from lmcache_ext.config import EngineConfig
from lmcache_ext.config.settings import LOCATIONS
from lmcache_ext.engine.level import Level
from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers import open_tier

_, DISK, GDS, REMOTE = LOCATIONS


def open_levels(config: EngineConfig, dtype: str = "") -> list[Level]:
    """Disk first, then GDS, then remote. Raises ConfigError that names the setting.

    Args:
        dtype: what KV is made of, e.g. `torch.bfloat16`; "": not known, and `fp8` is refused.
    """
    levels: list[Level] = []
    try:
        if config.local_disk:
            size = _bound("max_local_disk_size", config.max_local_disk_size, "local_disk")
            tier = open_tier(_url("file://", config.local_disk), capacity_gb=size)
            levels.append(Level("disk", tier, *_part(config, DISK)))
        if config.gds_path:
            size = _bound("max_gds_size", config.max_gds_size, "gds_path")
            tier = open_tier(_url("nixl://gds_mt", config.gds_path), capacity_gb=size)
            levels.append(Level("gds", tier, *_part(config, GDS)))
        if config.remote_url:
            serde = {"serde": config.remote_serde, "serde_key_file": config.remote_serde_key_file or ""}
            tier = open_tier(config.remote_url, **serde, serde_dtype=dtype)
            levels.append(Level("remote", tier, *_part(config, REMOTE)))
    except ConfigError as error:
        for level in levels:
            level.tier.close(1.0)
        if error.setting in ("serde", "serde_key_file"):
            raise ConfigError(f"remote_{error.setting}", error.value, error.why) from None
        raise
    return levels


def _bound(name: str, gigabytes: float, of: str) -> float:
    if not gigabytes:
        raise ConfigError(name, gigabytes, f"must be the GB for {of}")
    return gigabytes


def _part(config: EngineConfig, name: str) -> tuple[bool, bool]:
    """(reads, writes) of the tier that upstream calls `name`."""
    return _named(name, config.retrieve_locations), _named(name, config.store_location)


def _named(name: str, locations: Iterable[str]) -> bool:
    return not locations or name in locations


def _url(start: str, given: str) -> str:
    """`/a/,/b/` as well as a URL."""
    return given if "://" in given else f"{start}{given}"
