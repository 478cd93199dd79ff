"""The vLLM connector. Importing this module is cheap: no CUDA, no threads (vLLM imports it in every process)."""

from lmcache_ext.integration.vllm.connector import (
    LMCacheConnectorV1,
    LMCacheConnectorV1Dynamic,
    LMCacheMPConnector,
)
from lmcache_ext.integration.vllm.impl import LMCacheConnectorV1Impl

__all__ = ["LMCacheConnectorV1", "LMCacheConnectorV1Dynamic", "LMCacheConnectorV1Impl", "LMCacheMPConnector"]
