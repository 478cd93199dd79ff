"""What the proxy counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """All metrics of one proxy, in a registry of their own: several proxies may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "requests answered, by endpoint and HTTP status", "endpoint", "status"
        )
        self.handovers = self._counter("handovers", "prefills, by how the decoder came to start", "outcome")
        self.notifications = self._counter("notifications", "messages and ids in them, by what they were", "kind")
        self.hangups = self._counter("client_disconnects", "clients that left before their answer's end")
        self.stream_errors = self._counter("stream_errors", "streams that an engine did not finish")
        self.retries = self._counter("retries", "calls that went to another engine after a fault", "role")
        self.under_way = self._gauge("requests_under_way", "requests that clients wait for")
        self.waiting = self._gauge("handovers_waiting", "requests that wait to hear that their KV is stored")
        self.engine_up = self._gauge("engine_up", "1 while requests are sent there", "role", "engine")
        self.engine_tokens = self._gauge("engine_tokens", "tokens under way there, as estimated", "role", "engine")
        self.prefill_s = self._histogram("prefill_seconds", "from the prefill's request to its answer")
        self.handover_s = self._histogram("handover_seconds", "from the prefill's answer to the word that KV is stored")
        self.first_byte_s = self._histogram("time_to_first_byte_seconds", "from a request's arrival to its first byte")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lmcache_proxy_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"lmcache_proxy_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"lmcache_proxy_{name}", text, buckets=_SECONDS, registry=self.registry)
