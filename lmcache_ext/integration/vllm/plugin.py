"""The `vllm.general_plugins` entry: bare upstream names resolve to our classes, in every process of vLLM's.

`LMCACHE_DISABLE_PLUGIN=1` turns it off, as does leaving `lmcache_ext` out of `VLLM_PLUGINS`.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from lmcache_ext.integration.vllm.log import get_logger

logger = get_logger("plugin")

NAMES = ("LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheMPConnector")
_TRUE = {"1", "true", "yes", "on"}


def register() -> None:
    """Take over upstream's connector names. May run many times."""
    if os.environ.get("LMCACHE_DISABLE_PLUGIN", "").strip().lower() in _TRUE:
        logger.info("LMCACHE_DISABLE_PLUGIN is set: %s keep their meaning", ", ".join(NAMES))
        return
    for name in NAMES:
        KVConnectorFactory._registry[name] = _loader(name)
    logger.debug("%s resolve to lmcache_ext", ", ".join(NAMES))


def registered(name: str) -> bool:
    """Whether `name` resolves to our class in this process."""
    return getattr(KVConnectorFactory._registry.get(name), "lmcache_ext", False)


def _loader(name: str) -> Any:
    def load() -> Any:
        from lmcache_ext.integration import vllm

        return getattr(vllm, name)

    load.lmcache_ext = True  # type: ignore[attr-defined]
    return load
