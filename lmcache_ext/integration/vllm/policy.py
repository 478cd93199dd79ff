"""`kv_load_failure_policy` becomes `recompute` wherever our connector runs: vLLM's default fails the request."""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from lmcache_ext.integration.vllm.log import get_logger

logger = get_logger("policy")

OURS = frozenset({"LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheMPConnector"})
_MARK = "_lmcache_ext_recompute"


def recompute_on_failure(config: VllmConfig) -> None:
    """Set it on the configuration that vLLM's scheduler reads right after it built its connector.

    Under MultiConnector a child only sees a copy; `watch_multi_connector` sets the one that counts.
    """
    if config.kv_transfer_config.kv_load_failure_policy != "recompute":
        config.kv_transfer_config.kv_load_failure_policy = "recompute"
        logger.info("kv_load_failure_policy is now 'recompute': a failed load costs time, not the request")


def watch_multi_connector() -> None:
    """Let MultiConnector set the policy when one of its children is ours. Idempotent."""
    original = MultiConnector.__init__
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def init(self: Any, vllm_config: VllmConfig, role: Any, kv_cache_config: Any) -> None:
        original(self, vllm_config, role, kv_cache_config)
        children = vllm_config.kv_transfer_config.kv_connector_extra_config.get("connectors") or ()
        if any(child.get("kv_connector") in OURS for child in children):
            recompute_on_failure(vllm_config)

    setattr(init, _MARK, True)
    MultiConnector.__init__ = init
