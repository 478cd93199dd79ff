"""How an engine's chunks are divided among its ranks, if we know which bytes are which head's: TP sizes may differ."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, MLAAttentionSpec

from lmcache_ext.config import EngineConfig
from lmcache_ext.integration.vllm.model import Division, specs_of
from lmcache_ext.transfer.rendezvous import Berth


def division(config: VllmConfig, kv: KVCacheConfig, engine: EngineConfig, pools: Sequence[Berth]) -> Division | None:
    """How the chunks of a hand-over are divided; None where they belong to this very shape of engine.

    Args:
        pools: of every rank that has one, in their order.
    """
    if not engine.enable_pd or config.parallel_config.pipeline_parallel_size > 1 or not pools:
        return None
    specs, cuts = specs_of(kv), pools[0].cuts
    if not cuts or any(pool.cuts != cuts for pool in pools):
        return None
    if all(isinstance(spec, MLAAttentionSpec) for spec in specs):
        heads = 0
    else:
        heads = int(config.model_config.get_total_num_kv_heads())
        tp = int(config.parallel_config.tensor_parallel_size)
        here = {int(spec.num_kv_heads) for spec in specs} | {cut.heads for cut in cuts}
        if max(heads, tp) % min(heads, tp) or here != {max(1, heads // tp)}:
            return None
    pages = tuple((cut.layers, cut.outer, heads, cut.head_bytes) for cut in cuts)
    return Division(pages, ";".join(f"{cut.layers}x{cut.kind}" for cut in cuts))
