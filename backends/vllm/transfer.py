"""From a worker's role and ENABLE_LMCACHE to vLLM's ``--kv-transfer-config``.

The dictionaries are those of Dynamo's LMCache integration, word for word, so that anything written
for it keeps its meaning; ``connector_config`` adds where our class lives, and only there.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from dynamo_lmcache.vllm.settings import SettingError

logger = logging.getLogger(__name__)

Config = dict[str, Any]

MODULE_PATH = "lmcache_ext.integration.vllm"
SERVERS_CLIENT = "LMCacheMPConnector"
OURS = frozenset({"LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", SERVERS_CLIENT})
NIXL = "NixlConnector"

_LMCACHE_ONLY: Config = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
_NIXL_ONLY: Config = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}


class Role(str, Enum):
    """What a worker does for a request."""

    AGGREGATED = "agg"
    PREFILL = "prefill"
    DECODE = "decode"


def seed_config(role: Role, *, lmcache: bool) -> Config:
    """Return the transfer configuration of the integration document for one worker.

    Decode with the cache on is ours: NIXL comes first because the first connector that offers
    tokens loads all of them, and only NIXL has what the prefill worker computed.
    """
    if not lmcache:
        return copy.deepcopy(_NIXL_ONLY)
    if role is Role.AGGREGATED:
        return copy.deepcopy(_LMCACHE_ONLY)
    children = [_LMCACHE_ONLY, _NIXL_ONLY] if role is Role.PREFILL else [_NIXL_ONLY, _LMCACHE_ONLY]
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": copy.deepcopy(children)},
    }


def connector_config(role: Role, *, lmcache: bool, nixl_installed: bool | None = None) -> Config | None:
    """Return the keyword arguments of ``KVTransferConfig`` for one worker, or None for no connector.

    Args:
        role: what the worker does.
        lmcache: whether ENABLE_LMCACHE is on.
        nixl_installed: whether ``nixl`` can be imported; looked up when None.

    Raises:
        SettingError: if a disaggregated worker would have no way to hand its KV over.
    """
    config = seed_config(role, lmcache=lmcache)
    if uses(config, {NIXL}) and not (_has_nixl() if nixl_installed is None else nixl_installed):
        if role is not Role.AGGREGATED:
            raise SettingError(
                f"--disaggregation-mode {role.value} needs NIXL to hand KV over, and nixl is not installed: "
                "install it, or give --kv-transfer-config"
            )
        logger.warning("nixl is not installed: an aggregated worker without LMCache runs without a KV connector")
        return None
    for entry in walk(config):
        if entry["kv_connector"] in OURS:
            entry["kv_connector_module_path"] = MODULE_PATH
    # Read at the top level only. vLLM's default fails a request whose KV did not come, also over NIXL from a prefill
    # worker that died.
    config["kv_load_failure_policy"] = "recompute"
    return config


def walk(config: Mapping[str, Any]) -> Iterator[Config]:
    """Yield a transfer configuration and, depth first, the children of a MultiConnector."""
    if isinstance(config, dict):
        yield config
    children = (config.get("kv_connector_extra_config") or {}).get("connectors")
    for child in children if isinstance(children, list) else ():
        if isinstance(child, dict):
            yield from walk(child)


def uses(config: Mapping[str, Any] | None, names: set[str] | frozenset[str]) -> bool:
    """Tell whether any connector of ``config`` has one of ``names``."""
    return config is not None and any(entry.get("kv_connector") in names for entry in walk(config))


def _has_nixl() -> bool:
    return importlib.util.find_spec("nixl") is not None
