"""The scheduler side's figures."""

from __future__ import annotations

from lmcache_ext.engine import Directory
from lmcache_ext.integration.vllm.metadata import Tally
from lmcache_ext.metrics import Recorder


def measure(record: Recorder, directory: Directory, slot_bytes: int) -> None:
    """What host memory holds, and how much was found so far. `slot_bytes`: of a chunk, all ranks."""
    evicted = directory.evicted - int(record.totals.get("local_cpu_evict_keys_count", 0))
    if evicted:
        record.count("local_cpu_evict_count", evicted)
        record.count("local_cpu_evict_keys_count", evicted)
    record.gauge("local_cache_usage", directory.used * slot_bytes)
    record.gauge("local_cpu_hot_cache_count", len(directory))
    record.gauge("local_cpu_capacity_count", directory.capacity)
    record.gauge("pinned_memory_objs_count", directory.leases)
    looked = record.totals.get("num_lookup_tokens", 0)
    if looked:
        record.gauge("retrieve_hit_rate", record.totals.get("num_hit_tokens", 0) / looked)
        record.gauge("lookup_hit_rate", record.totals.get("num_lookup_hits", 0) / looked)


def clock(record: Recorder, verb: str, tally: Tally) -> None:
    """How long a plan took, and how fast it was. `verb`: store or retrieve."""
    record.sample(f"time_to_{verb}", tally.seconds)
    if tally.seconds > 0:
        record.sample(f"{verb}_speed", tally.nbytes / tally.seconds / 1e9)
