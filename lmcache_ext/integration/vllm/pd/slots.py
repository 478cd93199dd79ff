"""Where a hand-over's slots lie: in host memory, or with `pd_buffer_device: cuda` in the GPU's."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from vllm.platforms import current_platform

from lmcache_ext.config import EngineConfig, no_gpu_buffer
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.pd import Memory, SenderOptions, sums
from lmcache_ext.pd.options import Sums
from lmcache_ext.transfer import HostPool
from lmcache_ext.transfer.rendezvous import Berth

logger = get_logger("pd")

_POST_BYTES, _INFLIGHT_BYTES = 128 << 20, 1 << 30  # between GPUs, whose links carry hundreds of GB/s


def on_gpu(config: EngineConfig, parallel: Any, ranks: int) -> bool:
    """Whether a worker's pool shall lie in its GPU's memory. Says why not where that was asked for.

    Args:
        parallel: vLLM's `parallel_config`.
        ranks: of the engine.
    """
    own_process = getattr(parallel, "distributed_executor_backend", None) not in (None, "uni")
    if not config.enable_pd or config.pd_buffer_device != "cuda":
        return False
    why = no_gpu_buffer(config, ranks, own_process)
    if not current_platform.is_cuda():
        why = "there is no GPU"
    if why:
        logger.warning("pd_buffer_device=cuda: KV is handed over through host memory, because %s", why)
    return not why


def slots_of(berth: Berth, pool: HostPool | None) -> tuple[Memory, Sums]:
    """One rank's slots, and how they are summed. `pool`: mapped, if they are in host memory."""
    if pool is not None:
        return Memory.of(pool), sums.of_pool(pool)
    assert berth.gpu is not None and berth.pid == os.getpid(), "a GPU's memory is known to its worker's process alone"
    from lmcache_ext.pd.gpu_sums import GpuSums

    memory = Memory.on_gpu(berth.address, berth.shape, berth.gpu)
    return memory, GpuSums(memory)


def paced(options: SenderOptions, berth: Berth) -> SenderOptions:
    """Transfers as large as these slots' link wants them."""
    if berth.gpu is None:
        return options
    return replace(options, post_bytes=_POST_BYTES, inflight_bytes=_INFLIGHT_BYTES)
