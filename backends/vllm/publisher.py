"""What a worker tells the outside: KV events, load, and Prometheus metrics."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import Any

from dynamo.common.utils.prometheus import LLMBackendMetrics, register_engine_metrics_callback
from dynamo.llm import KvEventPublisher, WorkerMetricsPublisher
from prometheus_client import REGISTRY, CollectorRegistry
from vllm.config import VllmConfig
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import ZmqEventPublisher
from vllm.v1.metrics.loggers import StatLoggerBase

from dynamo_lmcache.vllm.args import WorkerConfig
from dynamo_lmcache.vllm.settings import SettingError

logger = logging.getLogger(__name__)

METRIC_PREFIXES = ["vllm:", "lmcache:"]


class EventSocket:
    """The ipc socket between vLLM's event publisher and Dynamo's relay, in a directory of its own."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="dynamo-lmcache-")
        # vLLM derives the endpoints of further data-parallel ranks only if it finds "inproc" or
        # "tcp" in the text, and then appends _dp<rank>.
        self.endpoint = f"ipc://{Path(self._directory.name) / 'inproc-kv-events'}"

    def close(self) -> None:
        """Remove the socket and its directory."""
        self._directory.cleanup()


def configure_events(config: WorkerConfig) -> EventSocket | None:
    """Have vLLM publish KV events, unless the user decided otherwise. Call before the engine starts.

    Raises:
        SettingError: for an endpoint that vLLM would connect to instead of binding it: no event
            would ever arrive, and nothing would say so.
    """
    args = config.engine_args
    given = args.kv_events_config
    if given is not None:
        if given.enable_kv_cache_events and _connects(given.endpoint):
            raise SettingError(
                f"--kv-events-config endpoint {given.endpoint!r} loses every event: vLLM binds tcp://*:PORT and "
                "ipc:// only, and connects to anything else; use an ipc:// path"
            )
        return None
    if not config.publish_kv_events:
        return None
    socket = EventSocket()
    args.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=socket.endpoint)
    return socket


def relay_events(config: WorkerConfig, vllm_config: VllmConfig, endpoint: Any, ranks: range) -> list[KvEventPublisher]:
    """Relay each rank's KV events to Dynamo's event plane.

    One publisher for each rank: a second one on the same rank would silently break the router's index.
    """
    events = vllm_config.kv_events_config
    if events is None or not events.enable_kv_cache_events:
        return []
    optional = {"kv_state_endpoint": config.runtime.kv_state_endpoint} if config.runtime.kv_state_endpoint else {}
    return [
        KvEventPublisher(
            endpoint=endpoint,
            kv_block_size=vllm_config.cache_config.block_size,
            zmq_endpoint=rank_endpoint(events.endpoint, rank),
            zmq_topic=events.topic or "",
            enable_local_indexer=True,
            dp_rank=rank,
            **optional,
        )
        for rank in ranks
    ]


def rank_endpoint(endpoint: str, rank: int) -> str:
    """Return where one rank's events can be subscribed to."""
    return str(ZmqEventPublisher.offset_endpoint_port(endpoint, rank)).replace("*", "127.0.0.1")


class LoadPublisher(StatLoggerBase):
    """Publishes the blocks that one engine uses, to the router and as a gauge."""

    def __init__(self, endpoint: Any | None, gauges: LLMBackendMetrics, rank: int) -> None:
        """`endpoint`: where routers hear it; None: gauges alone, and no socket is opened."""
        self._publisher = WorkerMetricsPublisher() if endpoint is not None else None
        self._gauges = gauges
        self._rank = rank
        self._total_blocks = 0
        if self._publisher is not None:
            # Not a coroutine but a future of the Rust runtime.
            self._ready = asyncio.ensure_future(self._publisher.create_endpoint(endpoint))
            self._ready.add_done_callback(_log_failure)

    def start(self, total_blocks: int) -> None:
        """Publish an empty engine of ``total_blocks``."""
        self._total_blocks = total_blocks
        self._gauges.set_total_blocks(str(self._rank), total_blocks)
        self._send(0.0)

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_args: Any, **_kwargs: Any) -> None:
        """Publish after an engine step."""
        if scheduler_stats is not None:
            self._send(scheduler_stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        """Nothing to say: ``start`` publishes when the number of blocks is known."""

    def _send(self, used: float) -> None:
        if self._publisher is not None:
            self._publisher.publish(self._rank, kv_used_blocks=int(self._total_blocks * used))
        self._gauges.set_gpu_cache_usage(str(self._rank), used)


class LoadPublishers:
    """Makes a ``LoadPublisher`` for each engine; vLLM calls it as its stat logger factory."""

    def __init__(self, endpoint: Any | None, *, model: str, component: str) -> None:
        self.registry = CollectorRegistry()
        self.gauges = LLMBackendMetrics(registry=self.registry, model_name=model, component_name=component)
        self._endpoint = endpoint
        self._made: list[LoadPublisher] = []

    def __call__(self, vllm_config: VllmConfig, engine_index: int = 0) -> StatLoggerBase:
        """Return the publisher of one engine."""
        publisher = LoadPublisher(self._endpoint, self.gauges, engine_index)
        self._made.append(publisher)
        return publisher

    def start(self, total_blocks: int) -> None:
        """Publish empty engines. ``total_blocks`` counts those of all of them together."""
        for publisher in self._made:
            publisher.start(total_blocks // len(self._made))


def expose_metrics(endpoint: Any, config: WorkerConfig, load: LoadPublishers) -> None:
    """Show vLLM's, the connector's and the load metrics on the system port's /metrics.

    vLLM's stat loggers live in this process and so do the connector's metrics that ride on them,
    so the process-wide registry has all of it.
    """
    register_engine_metrics_callback(endpoint=endpoint, registry=load.registry)
    register_engine_metrics_callback(
        endpoint=endpoint,
        registry=REGISTRY,
        metric_prefix_filters=METRIC_PREFIXES,
        namespace_name=config.namespace,
        component_name=config.component,
        endpoint_name=config.endpoint,
        model_name=config.served_name,
    )


def _connects(endpoint: str) -> bool:
    return endpoint.startswith("tcp://") and "*" not in endpoint and "::" not in endpoint


def _log_failure(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and future.exception() is not None:
        logger.error("load metrics will not reach the router: %s", future.exception())
