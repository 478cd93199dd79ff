"""Writes `dashboard.json` beside this file: panels are a table here, and Grafana's JSON around them there.

    python deploy/grafana/dashboard.py

`tests/deploy` asks a real Prometheus every query below and checks that the JSON is up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("dashboard.json")
WORKER = '{instance=~"$worker",model_name=~"$model"}'
FRONTEND = '{model=~"$model"}'
WIDTH, HEIGHT = 8, 8


@dataclass(frozen=True)
class Panel:
    """One chart: legend → PromQL. `note` is shown when the reader asks."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    note: str = ""
    stacked: bool = False
    top: float | None = None


def rate(name: str, by: str = "") -> str:
    """The counter's growth a second, over the workers that are chosen."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({name}{WORKER}[$__rate_interval]))"


def resolve(query: str, interval: str) -> str:
    """As Grafana does with every worker and model chosen."""
    return query.replace("$__rate_interval", interval).replace("$worker", ".*").replace("$model", ".*")


def quantile(q: float, histogram: str, where: str = WORKER) -> str:
    """A quantile of all observations in the interval."""
    return f"histogram_quantile({q}, sum by (le) (rate({histogram}_bucket{where}[$__rate_interval])))"


def mean(histogram: str) -> str:
    """The mean observation in the interval."""
    return f"{rate(f'{histogram}_sum')} / {rate(f'{histogram}_count')}"


PROMPT = rate("lmcache:num_prompt_tokens_total")
GPU = rate("lmcache:num_vllm_hit_tokens_total")
HOST = f"({rate('lmcache:num_hit_tokens_total')} - {rate('lmcache:num_failed_tokens_total')})"
TIERS = ("disk", "gds", "remote")


def of_tiers(*names: str) -> dict[str, str]:
    """Counters of each tier, a second; legend → PromQL."""
    return {
        f"{tier}, {name.replace('_', ' ')}": rate(f"lmcache:{tier}_{name}_total") for name in names for tier in TIERS
    }


def served(name: str, by: str = "") -> str:
    """A counter of the shared server's, a second. It has no model and is no worker."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({name}[$__rate_interval]))"


FOUND = served("lmcache_mp_lookup_hit_total")

ROWS: dict[str, tuple[Panel, ...]] = {
    "Does it help": (
        Panel(
            "Hit rate by tier",
            {"GPU prefix cache": f"{GPU} / {PROMPT}", "host memory": f"{HOST} / {PROMPT}"},
            "percentunit",
            "Share of the prompts' tokens that were not computed, and who had them.",
            stacked=True,
            top=1,
        ),
        Panel(
            "Prompt tokens by source",
            {"GPU prefix cache": GPU, "host memory": HOST, "computed": f"clamp_min({PROMPT} - {GPU} - {HOST}, 0)"},
            note="Tokens a second.",
            stacked=True,
        ),
        Panel(
            "Time to first token",
            {
                "median, worker": quantile(0.5, "vllm:time_to_first_token_seconds"),
                "95 %, worker": quantile(0.95, "vllm:time_to_first_token_seconds"),
                "95 %, frontend": quantile(0.95, "dynamo_frontend_time_to_first_token_seconds", FRONTEND),
            },
            "s",
        ),
    ),
    "Host memory": (
        Panel(
            "Pool occupancy",
            {
                "{{instance}}": f"sum by (instance) (lmcache:local_cpu_hot_cache_count{WORKER}) / "
                f"sum by (instance) (lmcache:local_cpu_capacity_count{WORKER})"
            },
            "percentunit",
            "Share of the slots that hold a chunk. A full pool is normal: see whether what was evicted is missed.",
            top=1,
        ),
        Panel("Pool bytes", {"{{instance}}": f"sum by (instance) (lmcache:local_cache_usage{WORKER})"}, "bytes"),
        Panel("Evicted chunks", {"{{instance}}": rate("lmcache:local_cpu_evict_keys_count_total", "instance")}, "ops"),
        Panel(
            "Leases and pinned blocks",
            {
                "chunks leased": f"sum(lmcache:pinned_memory_objs_count{WORKER})",
                "GPU blocks pinned": f"sum(lmcache:pinned_gpu_blocks{WORKER})",
            },
            note="Chunks that a load or a store holds, and GPU blocks that stores hold. Both return to 0 when idle.",
        ),
        Panel(
            "Tokens stored and skipped",
            {
                "stored": rate("lmcache:num_stored_tokens_total"),
                "skipped": rate("lmcache:num_skipped_store_tokens_total"),
            },
            note="Skipped: no slot, or no GPU blocks to spare.",
        ),
        Panel(
            "Requests",
            {
                "looked up": rate("lmcache:num_lookup_requests_total"),
                "loaded": rate("lmcache:num_retrieve_requests_total"),
                "nothing found": rate("lmcache:lookup_0_hit_requests_total"),
            },
            "reqps",
        ),
    ),
    "Tiers below host memory": (
        Panel(
            "Tokens from tiers",
            {tier: rate(f"lmcache:{tier}_hit_tokens_total") for tier in TIERS},
            note="A second. They came into host memory, and are among its hits above.",
            stacked=True,
        ),
        Panel("Bytes from and to tiers", of_tiers("loaded_bytes", "stored_bytes"), "Bps"),
        Panel(
            "Bytes in tiers",
            {tier: f"sum(lmcache:{tier}_usage_bytes{WORKER})" for tier in TIERS},
            "bytes",
            "As each engine knows of them: what engines share is counted by each.",
        ),
        Panel(
            "Chunks not written, failed",
            of_tiers("skipped_chunks", "failed_jobs"),
            "ops",
            "Not written: the tier was busy or full. Failed: the chunk was computed, or is not there later.",
        ),
        Panel(
            "Breaker trips, damaged objects",
            {
                f"{tier}, {name.replace('_', ' ')}": f"sum(lmcache:{tier}_{name}{WORKER})"
                for name in ("breaker_trips", "corrupt_objects")
                for tier in TIERS
            },
            note="Since the start. A tier whose breaker is open is passed by; a damaged object is deleted.",
        ),
        Panel(
            "Tiers that are too slow, or hang",
            {
                "tokens computed instead": rate("lmcache:num_slow_tier_tokens_total"),
                "chunks held by I/O": rate("lmcache:num_held_buffers_total"),
            },
            note="Computed instead: the tier is likely to take longer. Held: memory of I/O that passed its deadline.",
        ),
    ),
    "Copies": (
        Panel(
            "GB/s by direction",
            {
                "host to GPU, mean": mean("lmcache:retrieve_speed"),
                "GPU to host, mean": mean("lmcache:store_speed"),
            },
            note="Of one load or store while it runs, all ranks together; not the link's use over time.",
        ),
        Panel(
            "Duration, 95 %",
            {
                "load": quantile(0.95, "lmcache:time_to_retrieve"),
                "store": quantile(0.95, "lmcache:time_to_store"),
                "look-up": quantile(0.95, "lmcache:time_to_lookup"),
            },
            "s",
        ),
        Panel(
            "Faults",
            {
                "faults/s": rate("lmcache:num_faults_total"),
                "failed loads, tokens/s": rate("lmcache:num_failed_tokens_total"),
                "failed stores/s": rate("lmcache:put_failed_count_total"),
            },
            note="Each became a miss: the answer is right, its tokens were computed.",
        ),
        Panel(
            "Cache on",
            {"{{instance}}": f"min by (instance) (lmcache:lmcache_is_healthy{WORKER})"},
            note="0: the cache switched itself off, and requests go without it; or the engine made no step yet.",
            top=1,
        ),
    ),
    "Engine and router": (
        Panel(
            "Requests in the engine",
            {
                "running": f"sum(vllm:num_requests_running{WORKER})",
                "waiting": f"sum(vllm:num_requests_waiting{WORKER})",
            },
        ),
        Panel(
            "GPU KV cache",
            {"{{instance}}": f"max by (instance) (vllm:kv_cache_usage_perc{WORKER})"},
            "percentunit",
            top=1,
        ),
        Panel(
            "Time in the queue and in prefill, 95 %",
            {
                "queue": quantile(0.95, "vllm:request_queue_time_seconds"),
                "prefill": quantile(0.95, "vllm:request_prefill_time_seconds"),
            },
            "s",
        ),
        Panel("Preemptions", {"{{instance}}": rate("vllm:num_preemptions_total", "instance")}, "ops"),
        Panel(
            "Requests at the frontend",
            {"{{status}}": f"sum by (status) (rate(dynamo_frontend_requests_total{FRONTEND}[$__rate_interval]))"},
            "reqps",
        ),
        Panel(
            "Tokens reused, as the router sees it",
            {"reused": "sum(rate(dynamo_component_router_kv_worker_reused_tokens_total[$__rate_interval]))"},
            note="Only with --router-mode kv.",
        ),
    ),
    "Shared server": (
        Panel(
            "Chunks found",
            {"of those looked up": f"{FOUND} / {served('lmcache_mp_lookup_requested_total')}"},
            "percentunit",
            "Only with `lmcache-ext server`, and whatever workers are chosen.",
            top=1,
        ),
        Panel(
            "Chunks stored and leased",
            {"stored": served("lmcache_mp_l1_write_total"), "leased": served("lmcache_mp_l1_read_total")},
            "ops",
        ),
        Panel(
            "Bytes stored and leased",
            {
                "stored": served("lmcache_server_stored_bytes_total"),
                "leased": served("lmcache_server_leased_bytes_total"),
            },
            "Bps",
            "Clients move them themselves.",
        ),
        Panel(
            "Memory in use",
            {"{{instance}}": "max by (instance) (lmcache_mp_l1_usage_ratio)"},
            "percentunit",
            top=1,
        ),
        Panel(
            "Clients and what they hold",
            {
                "clients": "sum(lmcache_server_clients)",
                "silent": "sum(lmcache_server_silent_clients)",
                "leases": "sum(lmcache_server_leases)",
            },
            note="What a silent client holds stays held until its processes are proved dead.",
        ),
        Panel(
            "Evicted, refused, failed",
            {
                "evicted": served("lmcache_mp_l1_evicted_total"),
                "no room or no share": served("lmcache_mp_l1_allocation_failure_total"),
                "writer failed or died": served("lmcache_server_failed_stores_total"),
            },
            "ops",
            "Chunks a second.",
        ),
        Panel("Requests by kind", {"{{kind}}": served("lmcache_server_requests_total", "kind")}, "reqps"),
        Panel("Bytes in its tiers", {"{{l2_name}}": "sum by (l2_name) (lmcache_mp_l2_usage_bytes)"}, "bytes"),
    ),
}


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model."""
    return {
        "uid": "lmcache-ext",
        "title": "lmcache-ext",
        "tags": ["lmcache", "vllm", "dynamo"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": list(_variables())},
        "panels": list(_panels()),
    }


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    for name, label in (("model", "model_name"), ("worker", "instance")):
        query = f"label_values(lmcache:num_lookup_requests_total, {label})"
        yield {
            "name": name,
            "type": "query",
            "datasource": _source(),
            "query": {"query": query, "refId": name},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }


def _panels() -> Iterator[dict[str, Any]]:
    number, y = 1, 0
    for title, panels in ROWS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        number, y = number + 1, y + 1
        for i, panel in enumerate(panels):
            place = {"h": HEIGHT, "w": WIDTH, "x": i % 3 * WIDTH, "y": y + i // 3 * HEIGHT}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            number += 1
        y += -(-len(panels) // 3) * HEIGHT


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": _source()}
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.top is not None:
        defaults["max"] = panel.top
    if panel.stacked:
        defaults["custom"] = {"stacking": {"mode": "normal"}, "fillOpacity": 40}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.note,
        "datasource": _source(),
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def _source() -> dict[str, str]:
    return {"type": "prometheus", "uid": "${datasource}"}


def text() -> str:
    """What the file should hold."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    OUT.write_text(text())
