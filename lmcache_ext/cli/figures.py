"""The figures that `report` and `top` show, out of one window of a worker's metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from lmcache_ext.cli.scrape import Scrape, ScrapeError, Window

# Fewer tokens computed by the mean request than this, and its time is the step's, not the tokens'.
_LEAST_COMPUTED = 128
TIERS = ("disk", "gds", "remote")


@dataclass(frozen=True)
class TierFigures:
    """Of one tier below host memory. Its tokens are among those that host memory had."""

    kind: str  # disk, gds or remote
    hit: int  # tokens that came
    loaded_bytes: int
    stored_bytes: int
    skipped: int  # chunks not written: it was busy or full
    failed: int  # chunks that it failed to take or to give
    used_bytes: int
    chunks: int
    trips: int  # since the start
    damaged: int  # objects, since the start

    @property
    def is_used(self) -> bool:
        """Whether there is such a tier, as far as its figures tell."""
        return any(value for value in asdict(self).values() if not isinstance(value, str))


@dataclass(frozen=True)
class Figures:
    """Counts over the window, gauges at its end. Tokens unless the name says otherwise; None: can't be told."""

    requests: int
    prompt: int
    gpu: int  # held by vLLM's own prefix cache
    host: int  # loaded from host memory
    failed: int  # found, but the load failed: computed instead
    missed_requests: int  # of which nothing was found
    stored: int
    skipped: int  # not stored: no slot, no GPU blocks to spare
    stores: int
    failed_stores: int
    loads: int
    evicted_chunks: int
    faults: int
    slow: int  # computed because their tier is slower
    tiers: tuple[TierFigures, ...]  # that are used
    chunks: int
    capacity_chunks: int
    pool_bytes: int
    pinned_chunks: int
    pinned_gpu_blocks: int
    healthy: bool
    ttft_s: float | None
    load_s: float | None
    load_gb_per_s: float | None
    store_gb_per_s: float | None
    token_s: float | None  # of prefill for one computed token
    saved_s: float | None  # of prefill less the time of the loads, all requests together
    seconds: float | None

    @property
    def computed(self) -> int:
        """What neither cache had."""
        return max(0, self.prompt - self.gpu - self.host)

    @property
    def occupancy(self) -> float:
        """The share of the pool's slots that hold a chunk."""
        return self.chunks / self.capacity_chunks if self.capacity_chunks else 0.0

    @property
    def capacity_bytes(self) -> float | None:
        """The pool's size, from what its chunks take."""
        return self.pool_bytes / self.chunks * self.capacity_chunks if self.chunks else None

    def share(self, tokens: int) -> float:
        """Of the prompts' tokens. A request that is preempted may load twice, hence the bound."""
        return min(1.0, tokens / self.prompt) if self.prompt else 0.0

    def as_dict(self) -> dict[str, object]:
        """The same for `--json`, with the derived figures."""
        tiers = {tier.kind: asdict(tier) for tier in self.tiers}
        return {**asdict(self), "tiers": tiers, "computed": self.computed, "occupancy": self.occupancy}


def figures(window: Window) -> Figures:
    """Read them off. Raises ScrapeError where the worker runs without our cache."""
    last = window.last
    if not last.has("lmcache:num_lookup_requests_total"):
        raise ScrapeError("there are no lmcache: metrics: is this a worker, with ENABLE_LMCACHE=1?")

    def grew(name: str) -> int:
        return int(window.increase(f"lmcache:{name}_total"))

    def now(name: str) -> int:
        return int(last.total(f"lmcache:{name}"))

    failed = grew("num_failed_tokens")
    host = max(0, grew("num_hit_tokens") - failed)
    token_s = _seconds_per_token(window)
    loading = window.increase("lmcache:time_to_retrieve_sum")
    return Figures(
        requests=grew("num_lookup_requests"),
        prompt=grew("num_prompt_tokens"),
        gpu=grew("num_vllm_hit_tokens"),
        host=host,
        failed=failed,
        missed_requests=grew("lookup_0_hit_requests"),
        stored=grew("num_stored_tokens"),
        skipped=grew("num_skipped_store_tokens"),
        stores=grew("num_store_requests"),
        failed_stores=grew("put_failed_count"),
        loads=grew("num_retrieve_requests"),
        evicted_chunks=grew("local_cpu_evict_keys_count"),
        faults=grew("num_faults"),
        slow=grew("num_slow_tier_tokens"),
        tiers=tuple(_tiers(window)),
        chunks=now("local_cpu_hot_cache_count"),
        capacity_chunks=now("local_cpu_capacity_count"),
        pool_bytes=now("local_cache_usage"),
        pinned_chunks=now("pinned_memory_objs_count"),
        pinned_gpu_blocks=now("pinned_gpu_blocks"),
        healthy=not _switched_off(last),
        ttft_s=window.mean("vllm:time_to_first_token_seconds"),
        load_s=window.mean("lmcache:time_to_retrieve"),
        load_gb_per_s=window.mean("lmcache:retrieve_speed"),
        store_gb_per_s=window.mean("lmcache:store_speed"),
        token_s=token_s,
        saved_s=None if token_s is None else host * token_s - loading,
        seconds=window.seconds,
    )


def _tiers(window: Window) -> Iterator[TierFigures]:
    for kind in TIERS:
        prefix = f"lmcache:{kind}"
        tier = TierFigures(
            kind,
            hit=int(window.increase(f"{prefix}_hit_tokens_total")),
            loaded_bytes=int(window.increase(f"{prefix}_loaded_bytes_total")),
            stored_bytes=int(window.increase(f"{prefix}_stored_bytes_total")),
            skipped=int(window.increase(f"{prefix}_skipped_chunks_total")),
            failed=int(window.increase(f"{prefix}_failed_jobs_total")),
            used_bytes=int(window.last.total(f"{prefix}_usage_bytes")),
            chunks=int(window.last.total(f"{prefix}_objects")),
            trips=int(window.last.total(f"{prefix}_breaker_trips")),
            damaged=int(window.last.total(f"{prefix}_corrupt_objects")),
        )
        if tier.is_used:
            yield tier


def _switched_off(last: Scrape) -> bool:
    """Whether any engine's cache is. The gauge is 0, too, until an engine has made a step."""
    used = {labels.get("engine") for labels, n in last.samples.get("lmcache:num_lookup_requests_total", ()) if n}
    health = last.samples.get("lmcache:lmcache_is_healthy", ())
    return any(value == 0 and labels.get("engine") in used for labels, value in health)


def _seconds_per_token(window: Window) -> float | None:
    """Prefill's time for one computed token, rather too small than too large.

    vLLM tells each request's prefill time and how many tokens it computed. A step costs something however few tokens it
    computes, about what a decode step does, and a load within the step counts as prefill: both are taken off.
    """
    requests = window.increase("vllm:request_prefill_time_seconds_count")
    computed = window.increase("vllm:request_prefill_kv_computed_tokens_sum")
    if not requests or computed / requests < _LEAST_COMPUTED:
        return None
    step = window.mean("vllm:inter_token_latency_seconds") or 0.0
    loading = window.increase("lmcache:time_to_retrieve_sum")
    busy = window.increase("vllm:request_prefill_time_seconds_sum") - requests * step - loading
    return busy / computed if busy > 0 else None
