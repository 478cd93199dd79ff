"""Every metric there is. Names and kinds are upstream's where upstream has them; the others say so in their help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

_SECONDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_GB_PER_S = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 48.0, 52.0, 56.0, 64.0)


@dataclass(frozen=True)
class Metric:
    """One metric: `name` is without the prefix `lmcache:`; Prometheus appends `_total` to counters."""

    name: str
    kind: Kind
    help: str
    buckets: tuple[float, ...] = ()


def _of_tier(kind: str, what: str) -> tuple[Metric, ...]:
    """What one tier tells of itself; none of these is upstream's."""
    return (
        Metric(f"{kind}_hit_tokens", "counter", f"tokens that came from {what} (ours)"),
        Metric(f"{kind}_loaded_bytes", "counter", f"bytes that came from {what} (ours)"),
        Metric(f"{kind}_stored_bytes", "counter", f"bytes written to {what} (ours)"),
        Metric(f"{kind}_skipped_chunks", "counter", f"chunks not written to {what}: it was busy or full (ours)"),
        Metric(f"{kind}_failed_jobs", "counter", f"chunks that {what} failed to take or to give (ours)"),
        Metric(f"{kind}_usage_bytes", "gauge", f"bytes that chunks take on {what} (ours)"),
        Metric(f"{kind}_objects", "gauge", f"chunks on {what} that this engine knows of (ours)"),
        Metric(f"{kind}_breaker_trips", "gauge", f"how often {what} was switched off after faults (ours)"),
        Metric(f"{kind}_corrupt_objects", "gauge", f"damaged or foreign objects met on {what} (ours)"),
    )


CATALOGUE: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("num_lookup_requests", "counter", "requests looked up"),
        Metric("num_lookup_tokens", "counter", "tokens looked up"),
        Metric("num_lookup_hits", "counter", "tokens found by look-ups, also those the GPU held already"),
        Metric("lookup_0_hit_requests", "counter", "requests of which nothing was found"),
        Metric("num_prompt_tokens", "counter", "prompt tokens of the requests looked up"),
        Metric("num_vllm_hit_tokens", "counter", "tokens that vLLM's own prefix cache held"),
        Metric("num_retrieve_requests", "counter", "requests that loaded"),
        Metric("num_requested_tokens", "counter", "tokens that loads were asked for"),
        Metric("num_hit_tokens", "counter", "tokens promised to the engine and loaded"),
        Metric("num_failed_tokens", "counter", "tokens whose load failed and that were computed instead (ours)"),
        Metric("num_store_requests", "counter", "stores submitted"),
        Metric("num_stored_tokens", "counter", "tokens whose store completed"),
        Metric("num_skipped_store_tokens", "counter", "tokens not stored: no slot, no GPU blocks to spare (ours)"),
        Metric("put_failed_count", "counter", "stores that failed or were cancelled"),
        Metric("local_cpu_evict_count", "counter", "evictions from host memory"),
        Metric("local_cpu_evict_keys_count", "counter", "chunks evicted from host memory"),
        Metric("num_faults", "counter", "faults in the cache that became misses (ours)"),
        Metric("num_slow_tier_tokens", "counter", "tokens computed because their tier is slower (ours)"),
        Metric("num_held_buffers", "counter", "chunks of host memory that I/O which hangs still holds (ours)"),
        Metric("num_telemetry_reports", "counter", "requests reported to LMCACHE_REQUEST_TELEMETRY_ENDPOINT (ours)"),
        Metric("num_lost_telemetry_reports", "counter", "reports that did not arrive there (ours)"),
        *_of_tier("disk", "the local disk"),
        *_of_tier("gds", "the GDS tier"),
        *_of_tier("remote", "the remote tier"),
        Metric("pd_sent_chunks", "counter", "chunks that decode engines took, of each rank (ours)"),
        Metric("pd_handovers", "counter", "requests handed over whole to a decode engine (ours)"),
        Metric("pd_failed_handovers", "counter", "requests that could not be handed over (ours)"),
        Metric("pd_received_chunks", "counter", "chunks that prefill engines wrote here, of each rank (ours)"),
        Metric("pd_unclaimed_handovers", "counter", "requests handed over that no decode request came for (ours)"),
        Metric("pd_open_handovers", "gauge", "requests being handed over, or waiting for their decode request (ours)"),
        Metric("retrieve_hit_rate", "gauge", "tokens loaded / tokens looked up, since the start"),
        Metric("lookup_hit_rate", "gauge", "tokens found / tokens looked up, since the start"),
        Metric("local_cache_usage", "gauge", "bytes of host memory that hold chunks, all ranks"),
        Metric("local_cpu_hot_cache_count", "gauge", "chunks in host memory"),
        Metric("local_cpu_capacity_count", "gauge", "chunks that host memory holds at most (ours)"),
        Metric("pinned_memory_objs_count", "gauge", "chunks that a load or a store holds"),
        Metric("pinned_gpu_blocks", "gauge", "GPU blocks that stores under way hold (ours)"),
        Metric("lmcache_is_healthy", "gauge", "1 while the cache works, 0 once it was switched off"),
        Metric("server_in_use", "gauge", "1 while the shared cache server answers and its memory is mapped (ours)"),
        Metric("time_to_retrieve", "histogram", "seconds from the start of a load to its end", _SECONDS),
        Metric("time_to_store", "histogram", "seconds from the start of a store to its end", _SECONDS),
        Metric("time_to_lookup", "histogram", "seconds of one look-up, hashing included", _SECONDS),
        Metric("retrieve_speed", "histogram", "GB/s of one load, all ranks together", _GB_PER_S),
        Metric("store_speed", "histogram", "GB/s of one store, all ranks together", _GB_PER_S),
    )
}
