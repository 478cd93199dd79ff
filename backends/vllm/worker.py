"""A running worker: engine, endpoints, discovery, and the way back down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynamo.runtime import DistributedRuntime
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from dynamo_lmcache.vllm.args import WorkerConfig
from dynamo_lmcache.vllm.handlers import AggregatedHandler, DecodeHandler, PrefillHandler, Services
from dynamo_lmcache.vllm.health import Watchdog, probe_payload
from dynamo_lmcache.vllm.lora import Adapters
from dynamo_lmcache.vllm.publisher import LoadPublishers, configure_events, expose_metrics, relay_events
from dynamo_lmcache.vllm.registration import Registrar, dp_ranks
from dynamo_lmcache.vllm.shutdown import Shutdown
from dynamo_lmcache.vllm.transfer import OURS, Role, uses
from dynamo_lmcache.vllm.warmup import warm_up

logger = logging.getLogger(__name__)

_HANDLERS = {Role.AGGREGATED: AggregatedHandler, Role.DECODE: DecodeHandler, Role.PREFILL: PrefillHandler}


@dataclass(frozen=True)
class Served:
    """One endpoint, the function behind it, and what the canary sends there."""

    endpoint: Any
    function: Callable[..., Any]
    probe: dict[str, Any] | None = None


async def run_worker(config: WorkerConfig) -> None:
    """Start a worker and serve until it is shut down."""
    options = config.runtime
    planes = {"event_plane": options.event_plane}
    if hasattr(options, "response_plane"):  # Dynamo 1.4 has no choice there
        planes["response_plane"] = options.response_plane
    loop = asyncio.get_running_loop()
    runtime = DistributedRuntime(loop, options.discovery_backend, options.request_plane, **planes)
    endpoint = runtime.endpoint(config.endpoint_path())
    events = configure_events(config)
    listened = endpoint if config.publish_load else None
    load = LoadPublishers(listened, model=config.served_name, component=config.component)
    logger.info("KV connector: %s", config.engine_args.kv_transfer_config or "none")
    started = time.monotonic()
    engine, vllm_config = start_engine(config, load)
    try:
        load.gauges.set_model_load_time(time.monotonic() - started)
        await Worker(config, runtime, endpoint, engine, vllm_config, load).serve()
    finally:
        engine.shutdown()
        if events is not None:
            events.close()


def start_engine(config: WorkerConfig, load: LoadPublishers) -> tuple[AsyncLLM, VllmConfig]:
    """Start vLLM and return the client and its configuration. Blocks until the engine is up."""
    args = config.engine_args
    if args.enable_lora:
        os.environ.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    context = UsageContext.OPENAI_API_SERVER
    vllm_config = args.create_engine_config(usage_context=context)
    engine = AsyncLLM.from_vllm_config(
        vllm_config=vllm_config,
        usage_context=context,
        stat_loggers=[load],
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )
    return engine, vllm_config


class Worker:
    """The parts of one worker, wired together."""

    def __init__(
        self,
        config: WorkerConfig,
        runtime: DistributedRuntime,
        endpoint: Any,
        engine: AsyncLLM,
        vllm_config: VllmConfig,
        load: LoadPublishers,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._endpoint = endpoint
        self._engine = engine
        self._vllm = vllm_config
        self._load = load
        self._ranks = dp_ranks(vllm_config)
        self._watchdog = Watchdog(engine, runtime)
        self._registrar = Registrar(config, vllm_config, endpoint, self._ranks)
        self._adapters = self._make_adapters()
        self._services = self._make_services()
        self._shutdown = Shutdown(
            runtime, self._services.in_flight, drain_timeout_s=config.drain_timeout_s, stop_engine=self._stop_engine
        )

    async def serve(self) -> None:
        """Publish the model, and return after the runtime has been shut down."""
        probe = probe_payload(self._engine, self._config.runtime.health_check_payload)
        served = self._endpoints(probe)
        self._shutdown.watch([entry.endpoint for entry in served])
        self._load.start(self._vllm.cache_config.num_gpu_blocks or 0)
        # Held, because a relay stops when it is collected.
        relays = relay_events(self._config, self._vllm, self._endpoint, self._ranks)
        expose_metrics(self._endpoint, self._config, self._load)
        if self._config.warmup if self._config.warmup is not None else current_platform.is_cpu():
            await warm_up(self._engine, (probe.get("token_ids") or [0])[0])
        tells = self._config.publish_load and self._config.role is not Role.PREFILL
        if tells and hasattr(self._endpoint, "first_token_source"):
            source = await self._endpoint.first_token_source(self._registrar.worker_type)
            self._services.first_token_source = source
        if self._shutdown.started:
            return
        watching = asyncio.create_task(self._watchdog.run())
        try:
            await self._registrar.publish_model()
            logger.info(
                "serving %s at %s, %d KV event relays",
                self._config.served_name,
                self._config.endpoint_path(),
                len(relays),
            )
            await asyncio.gather(*(self._serve_endpoint(entry) for entry in served))
            self._shutdown.require_told()
        finally:
            self._watchdog.expect_end()
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    async def _serve_endpoint(self, entry: Served) -> None:
        name = self._config.served_name
        await entry.endpoint.serve_endpoint(
            entry.function,
            graceful_shutdown=True,
            metrics_labels=[("model", name), ("model_name", name)],
            health_check_payload=entry.probe,
        )

    def _endpoints(self, probe: dict[str, Any]) -> list[Served]:
        handler = _HANDLERS[self._config.role](self._services)
        # The same on the system port: POST /engine/control/clear_kv_blocks.
        self._runtime.register_engine_route("control/clear_kv_blocks", handler.clear)
        functions: dict[str, Callable[..., Any]] = {"clear_kv_blocks": handler.clear_kv_blocks}
        if self._config.engine_args.enable_lora:
            functions["load_lora"] = self._adapters.load
            functions["unload_lora"] = self._adapters.unload
            functions["list_loras"] = self._adapters.list
        others = [
            Served(self._runtime.endpoint(self._config.endpoint_path(name)), function)
            for name, function in functions.items()
        ]
        return [Served(self._endpoint, handler.generate, probe), *others]

    def _make_adapters(self) -> Adapters:
        config = self._config
        return Adapters(
            self._engine,
            base_names=(config.served_name, *config.aliases, config.model),
            enabled=bool(config.engine_args.enable_lora),
            publish=self._registrar.publish_adapter,
            withdraw=self._registrar.withdraw_adapter,
        )

    def _make_services(self) -> Services:
        model = self._vllm.model_config
        return Services(
            engine=self._engine,
            adapters=self._adapters,
            sampling_defaults=model.get_diff_sampling_param(),
            max_model_len=model.max_model_len,
            first_dp_rank=self._ranks.start,
            dp_ranks=len(self._ranks),
            on_engine_dead=self._watchdog.engine_died,
            reports_hits=uses(self._config.transfer_config, OURS),
        )

    async def _stop_engine(self) -> None:
        self._watchdog.expect_end()
        await asyncio.to_thread(self._engine.shutdown)
