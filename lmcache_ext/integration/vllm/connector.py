"""The classes that vLLM loads, by module path or through the plugin. They only delegate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from lmcache_ext.integration.vllm.impl import LMCacheConnectorV1Impl
from lmcache_ext.integration.vllm.metadata import Report, StepMeta
from lmcache_ext.integration.vllm.mp import Joining
from lmcache_ext.integration.vllm.plugin import registered
from lmcache_ext.integration.vllm.policy import watch_multi_connector
from lmcache_ext.integration.vllm.stats import LMCachePromMetrics, LMCacheStats

watch_multi_connector()  # vLLM imports this module before it builds a MultiConnector that holds us


class LMCacheConnectorV1(KVConnectorBase_V1, SupportsHMA):
    """KV offload for vLLM 0.26.0 to 0.32.0. Hooks and their order: docs/connector.md."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._impl = LMCacheConnectorV1Impl(vllm_config, role, self, self._joining(vllm_config))

    def _joining(self, vllm_config: VllmConfig) -> Joining | None:
        """The cache server to join; none: the cache is in vLLM's own processes."""
        return None

    @property
    def requires_kv_delivery(self) -> bool:
        """A dropped store is a later miss, nothing more."""
        return False

    # -- worker ------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._impl.register_kv_caches(kv_caches)

    def register_cross_layers_kv_cache(self, kv_cache: torch.Tensor, attn_backend: Any) -> None:
        self._impl.register_kv_caches({"all": kv_cache})

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMeta)
        self._impl.bind(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self.has_connector_metadata():
            meta = self._get_connector_metadata()
            assert isinstance(meta, StepMeta)
            self._impl.start_load_kv(meta)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are whole by the time the forward starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Stores start after the forward."""

    def wait_for_save(self) -> None:
        self._impl.wait_for_save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._impl.get_finished() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._impl.get_block_ids_with_load_errors()

    def build_connector_worker_meta(self) -> Report | None:
        return self._impl.build_connector_worker_meta()

    def shutdown(self) -> None:
        self._impl.shutdown()

    # -- scheduler ---------------------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._impl.bind_gpu_block_pool(gpu_block_pool)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._impl.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._impl.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMeta:
        return self._impl.build_connector_meta(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self._impl.update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self._impl.request_finished(request, block_ids)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._impl.request_finished(request, block_ids[0] if block_ids else [])

    def take_events(self) -> Iterable[Any]:
        return self._impl.take_events()

    def has_pending_push_work(self) -> bool:
        return self._impl.has_pending_push_work()

    def reset_cache(self) -> bool | None:
        return self._impl.reset_cache()

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
        """Only siblings in MultiConnector exchange any."""

    # -- metrics -----------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> LMCacheStats | None:
        # vLLM's frontend rebuilds a MultiConnector's stats by class name: ours must be the class behind that name.
        if self.role is not KVConnectorRole.SCHEDULER or not registered(type(self).__name__):
            return None
        delta = self._impl.take_metrics()
        return LMCacheStats(data=delta) if delta else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> LMCacheStats | None:
        return LMCacheStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> LMCachePromMetrics:
        return LMCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


class LMCacheConnectorV1Dynamic(LMCacheConnectorV1):
    """Upstream's name for the class that vLLM loads by module path."""


class LMCacheMPConnector(LMCacheConnectorV1):
    """Joins the cache server that `lmcache.mp.host` and `lmcache.mp.port` name. Without any of these keys, as with
    `--kv-offloading-backend lmcache`, it is `LMCacheConnectorV1`.

    Raises:
        ConfigError: a key `lmcache.mp.*` is wrong.
    """

    def _joining(self, vllm_config: VllmConfig) -> Joining | None:
        return Joining.of(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
