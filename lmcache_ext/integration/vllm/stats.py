"""Our metrics on vLLM's way: from the scheduler process to the frontend's Prometheus registry."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from lmcache_ext.metrics import CATALOGUE, Delta, merge


class LMCacheStats(KVConnectorStats):
    """`data` is a `metrics.Delta`."""

    data: Delta

    def reset(self) -> None:
        """Forget."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> LMCacheStats:
        """Both, as one."""
        self.data = merge(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """The interval in a log line: counters that moved."""
        return dict(self.data.get("counters", {}))

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())


class LMCachePromMetrics(KVConnectorPromMetrics):
    """`lmcache:*`, one child per engine. As with vLLM's own, a new engine's metrics take an earlier one's place."""

    _registered: ClassVar[list[Any]] = []

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        classes = {
            "counter": metric_types[Counter],
            "gauge": metric_types[Gauge],
            "histogram": metric_types[Histogram],
        }
        self._children: dict[tuple[str, int], Any] = {}
        while self._registered:
            with contextlib.suppress(KeyError):
                REGISTRY.unregister(self._registered.pop())
        for metric in CATALOGUE.values():
            extra = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
            family = classes[metric.kind](
                name=f"lmcache:{metric.name}", documentation=metric.help, labelnames=labelnames, **extra
            )
            self._registered.append(family)
            for engine, values in per_engine_labelvalues.items():
                self._children[metric.name, engine] = family.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one delta."""
        for name, by in transfer_stats_data.get("counters", {}).items():
            self._children[name, engine_idx].inc(by)
        for name, value in transfer_stats_data.get("gauges", {}).items():
            self._children[name, engine_idx].set(value)
        for name, values in transfer_stats_data.get("samples", {}).items():
            for value in values:
                self._children[name, engine_idx].observe(value)
