"""What the server tells of itself: /status as JSON, /metrics as Prometheus has them. Called in the service's thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lmcache_ext import __version__
from lmcache_ext.metrics import CATALOGUE
from lmcache_ext.server.memory import Group
from lmcache_ext.server.owners import Session
from lmcache_ext.server.service import Service
from lmcache_ext.tiers import Kind, Outcome


def status(service: Service, instance: str = "") -> dict[str, Any]:
    """Everything, as plain values. Sizes are bytes, times seconds."""
    directory, arena, tally = service.directory, service.directory.arena, service.tally
    now = time.monotonic()
    return {
        "is_healthy": True, "version": __version__, "instance_id": instance, "boot": service.boot.hex(),
        "uptime": now - service.began,
        "l1": {
            "size": service.segment.nbytes, "used": arena.used_bytes, "resident": service.segment.resident,
            "usage_ratio": arena.used_bytes / service.segment.nbytes, "chunks": len(directory),
            "leases": directory.leases, "evicted": directory.evicted, "policy": service.setup.policy,
            "extents": len(arena.extents), "spare_extents": arena.spare, "extent": arena.extent_bytes,
        },
        "l2": [_tier(service, i) for i in range(len(service.setup.levels))],
        "groups": [_group(group) for group in service.groups.values()],
        "clients": [_client(session, now) for session in service.sessions.values()],
        "lookups": {"requests": tally.lookups, "chunks": tally.lookup_chunks, "hits": tally.hit_chunks},
        "stored": {"chunks": tally.stored_chunks, "bytes": tally.stored_bytes, "failed": tally.failed_stores,
                   "refused": tally.refused_stores},
        "leased": {"chunks": tally.leased_chunks, "bytes": tally.leased_bytes},
        "quarantined": tally.quarantined, "proven_dead": tally.proven_dead,
        "requests": dict(tally.requests), "errors": dict(tally.errors),
    }  # fmt: skip


def _tier(service: Service, i: int) -> dict[str, Any]:
    level = service.setup.levels[i]
    counts = level.tier.counts()
    return {
        "kind": level.kind, "name": service.setup.names[i] if i < len(service.setup.names) else level.kind,
        "used": counts.used, "objects": counts.objects, "breaker_trips": counts.trips, "evicted": counts.evicted,
        "stored_bytes": counts.stored_bytes, "loaded_bytes": counts.loaded_bytes,
        "hits": counts.of(Kind.LOAD, Outcome.OK), "lookups": counts.of(Kind.LOOKUP),
        "faults": counts.of(Kind.LOAD, Outcome.FAILED, Outcome.CORRUPT, Outcome.LATE),
    }  # fmt: skip


def _group(group: Group) -> dict[str, Any]:
    return {
        "number": group.number, "model": group.model, "root": group.root.hex(), "ranks": len(group.parts),
        "chunk_bytes": group.slot_bytes, "chunk_tokens": group.tokens, "chunks": group.used,
        "used": group.used * group.slot_bytes, "extents": len(group.extents),
    }  # fmt: skip


def _client(session: Session, now: float) -> dict[str, Any]:
    return {
        "name": session.name, "pids": [process.pid for process in session.processes], "silent": session.silent,
        "heard": now - session.heard, "age": now - session.born, "tickets": len(session.tickets),
        "holds": session.holds, "writes": session.writes, "asks": len(session.asks), "groups": sorted(session.groups),
    }  # fmt: skip


_COUNTERS = (  # upstream's names first
    ("lmcache_mp_lookups", "look-ups answered", "lookups", "requests"),
    ("lmcache_mp_lookup_requested", "chunks looked up", "lookups", "chunks"),
    ("lmcache_mp_lookup_hit", "chunks found", "lookups", "hits"),
    ("lmcache_mp_l1_write", "chunks stored", "stored", "chunks"),
    ("lmcache_mp_l1_read", "chunks leased for reading", "leased", "chunks"),
    ("lmcache_mp_l1_allocation_failure", "chunks for which there was no room or no share", "stored", "refused"),
    ("lmcache_mp_l1_evicted", "chunks evicted", "l1", "evicted"),
    ("lmcache_server_stored_bytes", "bytes stored by clients (ours)", "stored", "bytes"),
    ("lmcache_server_leased_bytes", "bytes leased to clients (ours)", "leased", "bytes"),
    ("lmcache_server_failed_stores", "chunks whose writer failed or died (ours)", "stored", "failed"),
)
_GAUGES = (
    ("lmcache_mp_l1_memory_usage_bytes", "bytes of slots in use", "l1", "used"),
    ("lmcache_mp_l1_usage_ratio", "share of the memory that slots in use take", "l1", "usage_ratio"),
    ("lmcache_server_l1_chunks", "chunks that can be found (ours)", "l1", "chunks"),
    ("lmcache_server_leases", "leases and reservations held (ours)", "l1", "leases"),
    ("lmcache_server_spare_extents", "extents that no group has (ours)", "l1", "spare_extents"),
)


def metrics(service: Service) -> list[Metric]:
    """A snapshot for Prometheus."""
    return list(_metrics(service))


def _metrics(service: Service) -> Iterator[Metric]:
    now = status(service)
    for name, text, part, key in _COUNTERS:
        yield CounterMetricFamily(name, text, value=now[part][key])
    for name, text, part, key in _GAUGES:
        yield GaugeMetricFamily(name, text, value=now[part][key])
    yield GaugeMetricFamily("lmcache_server_clients", "sessions (ours)", value=len(now["clients"]))
    silent = sum(client["silent"] for client in now["clients"])
    yield GaugeMetricFamily("lmcache_server_silent_clients", "sessions that say nothing (ours)", value=silent)
    for what in ("requests", "errors"):
        family = CounterMetricFamily(f"lmcache_server_{what}", f"{what} by kind (ours)", labels=["kind"])
        for kind, count in now[what].items():
            family.add_metric([kind], count)
        yield family
    for key in ("used", "objects"):
        name = "lmcache_mp_l2_usage_bytes" if key == "used" else "lmcache_server_l2_objects"
        gauge = GaugeMetricFamily(name, f"{key} of each tier below host memory", labels=["l2_name"])
        for tier in now["l2"]:
            gauge.add_metric([tier["name"]], tier[key])
        yield gauge
    if service.lower:
        service.lower.measure(service.recorder)
    for name, value in service.recorder.totals.items():
        kind = CounterMetricFamily if CATALOGUE[name].kind == "counter" else GaugeMetricFamily
        yield kind(f"lmcache:{name}", CATALOGUE[name].help, value=value)
