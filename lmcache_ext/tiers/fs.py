"""A folder that engines on several hosts share: `fs:///mnt/kv/`. The disk tier, with what network mounts need.

Objects are the disk tier's files, written under a temporary name and renamed, so a reader on another host sees a whole
object or none. What differs: other engines' objects are looked for; locks are not trusted to reach other hosts; and the
mount may come back as another device.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lmcache_ext.errors import ConfigError
from lmcache_ext.tiers.disk import FORSAKEN, SHARDS, Disk
from lmcache_ext.tiers.medium import MEDIA
from lmcache_ext.tiers.urls import Address

logger = logging.getLogger("lmcache_ext.tiers")


@MEDIA.register("fs")
class Share(Disk):
    """`Disk` over one folder that others use, too; arguments as there.

    A host in the URL is accepted and ignored, as upstream's `fs://host:port/path` has one: the mount decides.
    """

    @classmethod
    def from_address(cls, address: Address) -> Share:
        """`fs:///folder/?odirect=1&fsync=0&shared=1`"""
        _, _, path = address.location.partition("/")
        if not path or "," in path:
            raise ConfigError("url", address.shown, "must name one absolute folder: fs:///mnt/kv/")
        odirect, fsync, shared = (address.flag(*flag) for flag in (("odirect", True), ("fsync",), ("shared", True)))
        return cls([Path("/", path)], odirect, fsync, shared)

    def _is_forsaken(self, path: str, when: float) -> bool:
        """Both old and unlocked: a mount may keep locks to its own host, so that no lock proves nothing."""
        return time.time() - when > FORSAKEN and super()._is_forsaken(path, when)

    def _require_mounted(self, folder: Path) -> None:
        """A network mount gets a new device number each time. Ours is known by its subfolders."""
        device = folder.stat().st_dev
        if device != self._devices[folder]:
            if not all((folder / shard).is_dir() for shard in SHARDS):
                raise OSError(f"{folder} is mounted anew, and is not the folder that it was")
            logger.info("%s is mounted anew", folder)
            self._devices[folder] = device
        super()._require_mounted(folder)
