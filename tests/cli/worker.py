"""A worker's system port without a worker: serves what our own Recorder counted, and vLLM's metrics beside it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lmcache_ext.metrics import CATALOGUE, Recorder

LABELS = {"model_name": "demo", "engine": "0"}
VLLM = {  # the kinds that vLLM 0.31.0 gives them
    "vllm:num_requests_running": Gauge,
    "vllm:num_requests_waiting": Gauge,
    "vllm:kv_cache_usage_perc": Gauge,
    "vllm:prompt_tokens": Counter,
    "vllm:generation_tokens": Counter,
    "vllm:num_preemptions": Counter,
    "vllm:time_to_first_token_seconds": Histogram,
    "vllm:inter_token_latency_seconds": Histogram,
    "vllm:request_queue_time_seconds": Histogram,
    "vllm:request_prefill_time_seconds": Histogram,
    "vllm:request_prefill_kv_computed_tokens": Histogram,
}


class Worker:
    """Metrics of one worker, to be moved by a test."""

    def __init__(self, labels: Mapping[str, str] = LABELS, cache: bool = True) -> None:
        self.registry = CollectorRegistry()
        self.recorder = Recorder()
        self._labels = dict(labels)
        kinds = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self._ours = {
            metric.name: self._child(
                kinds[metric.kind], f"lmcache:{metric.name}", **({"buckets": metric.buckets} if metric.buckets else {})
            )
            for metric in CATALOGUE.values()
            if cache
        }
        self._vllm = {name: self._child(kind, name) for name, kind in VLLM.items()}

    def _child(self, kind, name, **more):
        return kind(name, name, list(self._labels), registry=self.registry, **more).labels(*self._labels.values())

    def vllm(self, **values: float) -> None:
        """Move vLLM's metrics, named without prefix: counters and histograms by, gauges to."""
        for name, value in values.items():
            child = self._vllm[f"vllm:{name}"]
            move = getattr(child, {Counter: "inc", Gauge: "set", Histogram: "observe"}[type(child)])
            move(value)

    def text(self) -> bytes:
        """What /metrics answers now."""
        delta = self.recorder.take() or {}
        for name, by in delta.get("counters", {}).items():
            self._ours[name].inc(by)
        for name, value in delta.get("gauges", {}).items():
            self._ours[name].set(value)
        for name, values in delta.get("samples", {}).items():
            for value in values:
                self._ours[name].observe(value)
        return generate_latest(self.registry)

    def request(self, prompt: int = 1000, gpu: int = 0, host: int = 0, seconds: float = 0.5) -> None:
        """One request as the connector and vLLM count it; what is not found is computed and stored."""
        record = self.recorder
        record.count("num_lookup_requests")
        record.count("num_lookup_tokens", prompt)
        record.count("num_prompt_tokens", prompt)
        record.count("num_lookup_hits", gpu + host)
        record.count("num_vllm_hit_tokens", gpu)
        if not gpu + host:
            record.count("lookup_0_hit_requests")
        record.sample("time_to_lookup", 0.0005)
        if host:
            record.count("num_retrieve_requests")
            record.count("num_requested_tokens", host)
            record.count("num_hit_tokens", host)
            record.sample("time_to_retrieve", 0.01)
            record.sample("retrieve_speed", 8.0)
        record.count("num_store_requests")
        record.count("num_stored_tokens", prompt - gpu - host)
        record.sample("time_to_store", 0.02)
        record.sample("store_speed", 4.0)
        self.vllm(time_to_first_token_seconds=seconds, request_prefill_time_seconds=seconds)
        self.vllm(request_prefill_kv_computed_tokens=prompt - gpu - host, inter_token_latency_seconds=0.01)
        self.vllm(prompt_tokens=prompt, generation_tokens=1, request_queue_time_seconds=0.001)

    def pool(self, chunks: int, capacity: int, chunk_bytes: int = 1 << 20) -> None:
        """Gauges of host memory."""
        record = self.recorder
        record.gauge("local_cpu_hot_cache_count", chunks)
        record.gauge("local_cpu_capacity_count", capacity)
        record.gauge("local_cache_usage", chunks * chunk_bytes)
        record.gauge("pinned_memory_objs_count", 2)
        record.gauge("pinned_gpu_blocks", 3)
        record.gauge("lmcache_is_healthy", 1)

    def tier(
        self, kind: str, tokens: int = 0, nbytes: int = 0, chunks: int = 1, trips: int = 0, damaged: int = 0
    ) -> None:
        """A tier brought `tokens` in `nbytes`, and was given as many; and its gauges."""
        record = self.recorder
        record.count(f"{kind}_hit_tokens", tokens)
        record.count(f"{kind}_loaded_bytes", nbytes)
        record.count(f"{kind}_stored_bytes", nbytes)
        record.count(f"{kind}_skipped_chunks", chunks)
        record.count(f"{kind}_failed_jobs", chunks)
        record.gauge(f"{kind}_usage_bytes", nbytes)
        record.gauge(f"{kind}_objects", chunks)
        record.gauge(f"{kind}_breaker_trips", trips)
        record.gauge(f"{kind}_corrupt_objects", damaged)


@contextmanager
def served(*workers: Worker) -> Iterator[list[str]]:
    """Serve each worker's /metrics on a port of its own; their URLs."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(worker)) for worker in workers]
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield [f"http://127.0.0.1:{server.server_port}/metrics" for server in servers]
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(10)


def _handler(worker: Worker) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/metrics"
            body = worker.text() if found else b"not here"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Handler
