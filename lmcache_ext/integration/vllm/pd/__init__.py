"""Prefill and decode apart, by plain `vllm serve`: what the scheduler side does for a hand-over. docs/pd.md."""

from lmcache_ext.integration.vllm.pd.base import Apart
from lmcache_ext.integration.vllm.pd.division import division
from lmcache_ext.integration.vllm.pd.opening import open_handover
from lmcache_ext.integration.vllm.pd.slots import on_gpu

__all__ = ["Apart", "division", "on_gpu", "open_handover"]
