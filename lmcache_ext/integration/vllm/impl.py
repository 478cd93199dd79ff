"""`LMCacheConnectorV1Impl`: what stands behind the connector classes, in either role.

Every scheduler-side hook runs under one guard, because an exception there ends vLLM's engine core: a fault becomes a
logged miss. After `_MAX_FAULTS` of them the cache is switched off, loudly, and the engine serves on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from lmcache_ext.config import GIB, default_pool_gb, handover, load_config, pool_gb, require_pool_fits
from lmcache_ext.engine import Below, Directory, Lower, Shelf, open_levels
from lmcache_ext.errors import ConfigError, LMCacheError
from lmcache_ext.integration.vllm.events import Stream
from lmcache_ext.integration.vllm.guard import guarded
from lmcache_ext.integration.vllm.log import get_logger, show_core_logs
from lmcache_ext.integration.vllm.metadata import Report, StepMeta
from lmcache_ext.integration.vllm.model import Model, Names, kv_dtype, namespace, unsupported
from lmcache_ext.integration.vllm.mp import Joining, open_client
from lmcache_ext.integration.vllm.pace import Pace
from lmcache_ext.integration.vllm.pd import division, on_gpu, open_handover
from lmcache_ext.integration.vllm.policy import recompute_on_failure
from lmcache_ext.integration.vllm.scheduler import SchedulerSide
from lmcache_ext.integration.vllm.seat import Seat
from lmcache_ext.integration.vllm.turns import take_turns_sooner
from lmcache_ext.integration.vllm.worker import WorkerSide, rank_of
from lmcache_ext.keys import fresh
from lmcache_ext.metrics import Recorder
from lmcache_ext.server.client import Spec
from lmcache_ext.telemetry import Telemetry, open_telemetry
from lmcache_ext.tiers import Parts
from lmcache_ext.tracing import Spans, start_spans
from lmcache_ext.transfer import Growth, HostPool, rendezvous

logger = get_logger("connector")

POOL_SETTING = "LMCACHE_MAX_LOCAL_CPU_SIZE"
_FIND_SECONDS = 30.0  # the workers published before vLLM built its scheduler
_JOIN_SECONDS = 1.0
_MAX_FAULTS = 20


def _nothing() -> tuple[int | None, bool]:
    return 0, False


def _freed() -> tuple[bool, dict[str, Any] | None]:
    return False, None


class LMCacheConnectorV1Impl:
    """One role's half of the connector.

    Args:
        vllm_config: vLLM's configuration; `kv_transfer_config` holds our settings under `lmcache.*`.
        role: SCHEDULER or WORKER.
        parent: the connector class that delegates to us; knows the KV cache's configuration.
        joining: the cache server that holds the chunks; None: we do.

    Raises:
        ConfigError: a setting is wrong; the message names it.
        LayoutError: at `register_kv_caches`, for a KV layout that we do not know.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, parent: KVConnectorBase_V1, joining: Joining | None = None
    ) -> None:
        show_core_logs()
        self._vllm_config = vllm_config
        self._transfer_config = vllm_config.kv_transfer_config
        self._extra: dict[str, Any] = dict(self._transfer_config.kv_connector_extra_config or {})
        self._kv = parent._kv_cache_config
        self._joining = joining
        self.config = load_config(self._extra, defaults=self._defaults())
        self.scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._faults = 0
        self._pool: Any = None
        why = unsupported(vllm_config, self._kv)
        if why:
            if role is KVConnectorRole.SCHEDULER:
                logger.warning("this model is served without the KV cache layer: %s", why)
            return
        take_turns_sooner()
        self._model = Model.of(vllm_config, self._kv)
        self._bpc = self._model.blocks_per_chunk(self.config)
        self._handover = handover(
            self.config, str(self._transfer_config.kv_role), self._model.writers, self._model.world_size
        )
        if joining and self._handover:
            raise ConfigError("enable_pd", True, "at a cache server there is nothing to hand over; leave one out")
        if role is KVConnectorRole.SCHEDULER:
            recompute_on_failure(vllm_config)
            self.scheduler = self._join(joining) if joining else self._open_scheduler()
        else:
            self._worker = self._open_worker()

    def _defaults(self) -> dict[str, Any]:
        """What vLLM's own flags and upstream's unprefixed keys say; any setting of ours beats it."""
        defaults: dict[str, Any] = {}
        if self._extra.get("discard_partial_chunks"):
            defaults["save_unfull_chunk"] = False
        if self._joining and self._joining.save_decode_cache is not None:
            defaults["save_decode_cache"] = self._joining.save_decode_cache
        cache = self._vllm_config.cache_config
        size = getattr(cache, "kv_offloading_size", None)
        if size is not None and getattr(cache, "kv_offloading_backend", None) == "lmcache":
            # `--kv-offloading-size`: GiB over all ranks; vLLM does not hand it to a connector
            defaults["max_local_cpu_size"] = size / self._vllm_config.parallel_config.world_size
        return defaults

    def _skip_last(self) -> int:
        value = self._extra.get("skip_last_n_tokens", 0)
        if not isinstance(value, int) or value < 0:
            raise ConfigError("skip_last_n_tokens", value, "must be a number of tokens, 0 or more")
        return value

    def _open_worker(self) -> WorkerSide:
        parallel = self._vllm_config.parallel_config
        workers = max(1, int(getattr(parallel, "world_size", 1)) // max(1, getattr(parallel, "nnodes", 1)))
        gb = pool_gb(self.config)
        gpu = on_gpu(self.config, parallel, self._model.world_size)
        if self._joining:
            gb = None
        elif gb is None:
            gb = default_pool_gb(workers)
            logger.info("%s is unset: %.2f GB of host memory for this rank", POOL_SETTING, gb)
        elif not gpu:
            require_pool_fits(gb, workers, POOL_SETTING)
        return WorkerSide(
            str(self._transfer_config.engine_id),
            self._model,
            rank_of(self._vllm_config),
            self._bpc,
            None if gb is None else int(gb * GIB),
            self.config.load_timeout_secs,
            "pd_buffer_size" if gpu else POOL_SETTING,
            gpu,
        )

    def _open_scheduler(self) -> SchedulerSide:
        engine_id, model = str(self._transfer_config.engine_id), self._model
        found = [rendezvous.find(engine_id, rank, _FIND_SECONDS) for rank in model.writers]
        pools = [pool for pool in found if pool is not None]
        growth: list[Growth] = []
        try:
            growth = [Growth(pool.path, pool.shape, model.members) for pool in pools]
        except OSError as error:
            logger.error("a worker's pool can't be opened: %s", error)
        for each in growth:
            each.serve()  # vLLM makes its scheduler last
        slots = min(pool.slots for pool in pools) if len(growth) == len(found) else 0
        if not slots:
            logger.error("%d of %d workers' pools can be used; nothing will be cached", len(growth), len(found))
        rendezvous.retract(engine_id, model.world_size)
        in_host = [pool for pool in pools if pool.gpu is None]
        maps = [HostPool.attach(pool.path, pool.shape, member=0) for pool in in_host] if slots else []
        stream = self._stream()
        shared = division(self._vllm_config, self._kv, self.config, pools)
        own = namespace(self._vllm_config, model, self.config, pools, 0).root()
        names = Names(own if shared else None)

        def root(epoch: int) -> bytes:
            """After a reset nobody else finds what is stored, here or in tiers, but who hands over to this engine."""
            if self._handover is None:
                return fresh(own) if epoch else own
            if epoch:
                names.renew()
            return namespace(self._vllm_config, model, self.config, pools, epoch, shared).root()

        return SchedulerSide(
            self.config,
            block_size=model.block_size,
            workers=model.world_size,
            slots=slots,
            grown=lambda: min(slots, *(pool.slots() for pool in growth)),
            row_bytes=[pool.row_bytes for pool in pools],
            root=root,
            stream=stream,
            skip_last=self._skip_last(),
            stores=self._transfer_config.kv_role != "kv_consumer",
            below=self._tiers(maps, names, stream) if slots else None,
            telemetry=self._reports(),
            spans=self._traces(),
            pd=open_handover(self._handover, self.config, model, pools if slots else [], maps, shared),
        )

    def _join(self, joining: Joining) -> SchedulerSide:
        """As `_open_scheduler`, with the chunks in a cache server's memory."""
        engine_id, model = str(self._transfer_config.engine_id), self._model
        found = [rendezvous.find(engine_id, rank, _FIND_SECONDS) for rank in range(model.world_size)]
        workers = [berth for berth in found if berth is not None]
        rendezvous.retract(engine_id, model.world_size)
        if len(workers) < model.world_size:
            raise LMCacheError(f"{len(workers)} of {model.world_size} workers said where their KV cache is")
        name = f"{self._vllm_config.model_config.model} {engine_id}"
        client = open_client(joining, name[-250:], workers, self.config.max_local_cpu_size)
        at = client.attachment
        advised = {"chunk_size": at.welcome.chunk_size} if at else {}
        self.config = load_config(self._extra, defaults={**advised, **self._defaults()})
        self._bpc = model.blocks_per_chunk(self.config)
        writers = [workers[rank] for rank in model.writers]

        own = namespace(self._vllm_config, model, self.config, writers, 0).root()
        parts = tuple(each.row_bytes * self._bpc for each in writers)
        spec = Spec(own, str(self._vllm_config.model_config.model)[-250:], parts, self.config.chunk_size)
        ranks = [model.writers.index(model.writer(rank)) for rank in range(model.world_size)]
        stream = self._stream()
        seat = Seat(client, spec, self._bpc, ranks, stream.memory if stream else None)
        if at:
            client.wait_up(_JOIN_SECONDS, spec.root)
        return SchedulerSide(
            self.config,
            block_size=model.block_size,
            workers=model.world_size,
            slots=0,
            grown=lambda: 0,
            row_bytes=[each.row_bytes for each in writers],
            root=lambda epoch: seat.move(fresh(own) if epoch else own),
            stream=stream,
            skip_last=self._skip_last(),
            stores=self._transfer_config.kv_role != "kv_consumer",
            seat=seat,
            telemetry=self._reports(),
            spans=self._traces(),
        )

    def _stream(self) -> Stream | None:
        """Where our KV events go, if vLLM publishes any."""
        events = getattr(self._vllm_config, "kv_events_config", None)
        return Stream() if events and events.enable_kv_cache_events else None

    def _traces(self) -> Spans:
        """Where vLLM's own traces go, or as the environment says."""
        endpoint = getattr(getattr(self._vllm_config, "observability_config", None), "otlp_traces_endpoint", None)
        return start_spans(self.config.enable_tracing, endpoint, str(self._transfer_config.engine_id))

    def _reports(self) -> Telemetry:
        """Under the name by which clients know the model."""
        served = self._vllm_config.model_config.served_model_name
        return open_telemetry(served[0] if isinstance(served, list) else str(served), self._model.world_size)

    def _tiers(
        self, maps: Sequence[HostPool], names: Callable[[bytes], bytes], stream: Stream | None
    ) -> Callable[[Directory, Recorder, Pace], Below] | None:
        """What opens the tiers below a directory of these pools."""
        config, size = self.config, self._model.block_size
        levels = open_levels(config, kv_dtype(self._vllm_config))
        if not levels:
            return None
        for level in levels:
            if stream and level.kind != "remote":  # what other machines reach as well is no reason to come here
                level.shelf = Shelf(level.tier, stream.disk)

        def parts(slot: int, tokens: int) -> Parts:
            return [each.part(slot, -(-tokens // size)) for each in maps]

        return lambda directory, recorder, pace: Lower(
            directory, levels, parts, recorder, keeps=config.local_cpu, min_uses=config.min_uses_before_write_back,
            lookup_seconds=config.lookup_timeout_ms / 1e3, only_faster=config.skip_slow_tiers,
            compute_rate=lambda: pace.rate, names=names,
        )  # fmt: skip

    # -- scheduler side ----------------------------------------------------------------------------------------------

    @guarded(lambda: None)
    def bind_gpu_block_pool(self, pool: Any) -> None:
        """vLLM's block pool exists now."""
        self._pool = pool
        assert self.scheduler is not None
        self.scheduler.bind(pool)

    @guarded(_nothing)
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens that we can load beyond those that vLLM has; whether the request has to wait for them."""
        assert self.scheduler is not None
        return self.scheduler.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM allocated. A fault here must not leave promised blocks unloaded, so it is not simply a miss."""
        side = self.scheduler
        if side is None:
            return
        ids: list[int] = list(blocks.get_block_ids()[0])
        try:
            side.allocated(request, ids, num_external_tokens)
        except Exception:
            self.faulted("update_state_after_alloc")
            if num_external_tokens > 0:
                side.refuse(request.request_id, ids, side.waits(request))

    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        """Orders for the step. Not guarded: without them promised blocks would be read unloaded."""
        return self.scheduler.step(scheduler_output) if self.scheduler else StepMeta()

    @guarded(lambda: None)
    def update_connector_output(self, output: Any) -> None:
        """What the workers reported."""
        assert self.scheduler is not None
        report = output.kv_connector_worker_meta
        self.scheduler.update(report if isinstance(report, Report) else None, set(output.invalid_block_ids or ()))

    @guarded(_freed)
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request is over; its blocks need not wait for us: those that we still read are pinned."""
        assert self.scheduler is not None
        return False, self.scheduler.finished(request, block_ids)

    @guarded(list)
    def take_events(self) -> list[Any]:
        """KV events of our tiers."""
        assert self.scheduler is not None
        return self.scheduler.events()

    @guarded(bool)
    def has_pending_push_work(self) -> bool:
        """Whether stores still hold blocks: their completion reaches us only through a step."""
        assert self.scheduler is not None
        return self.scheduler.busy()

    def reset_cache(self) -> bool:
        """Forget everything that was stored."""
        side = self.scheduler
        try:
            return side.reset() if side is not None else True
        except Exception:  # what is not forgotten must not be found
            self.faulted("reset_cache")
            assert side is not None
            side.switch_off()
            return True

    def faulted(self, hook: str) -> None:
        """A hook failed."""
        self._faults += 1
        logger.exception("fault %d in %s; the request goes on without the cache", self._faults, hook)
        if self.scheduler is not None:
            self.scheduler.recorder.count("num_faults")
            if self._faults == _MAX_FAULTS:
                logger.error("%d faults: the KV cache layer is switched off, the engine serves on", self._faults)
                self.scheduler.switch_off()

    # -- worker side -------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Where the KV pages lie. Refuses a layout that we don't know."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    def bind(self, meta: StepMeta) -> None:
        """A step begins."""
        if self._worker is not None:
            self._worker.bind(meta)

    def start_load_kv(self, meta: StepMeta) -> None:
        """The forward comes next, if this step has a load that it needs."""
        if self._worker is not None:
            self._worker.start_load(meta)

    def wait_for_save(self) -> None:
        """The forward was issued."""
        if self._worker is not None:
            self._worker.save()

    def get_finished(self) -> set[str]:
        """Requests whose loads ended."""
        return self._worker.collect() if self._worker is not None else set()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load failed."""
        return self._worker.invalid() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> Report | None:
        """Plans that ended."""
        return self._worker.report() if self._worker is not None else None

    def shutdown(self) -> None:
        """The process is going down."""
        if self._worker is not None:
            self._worker.close()
        if self.scheduler is not None:
            self.scheduler.close()

    # -- both --------------------------------------------------------------------------------------------------------

    def take_metrics(self) -> dict[str, Any] | None:
        """What is new in the metrics; scheduler side only."""
        if self.scheduler is None:
            return None
        self.scheduler.measure()
        return self.scheduler.recorder.take()
