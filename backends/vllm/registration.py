"""The model card: what the frontend learns about a worker."""

from __future__ import annotations

import json
import logging
from typing import Any

from dynamo.common.utils.endpoint_types import parse_endpoint_types
from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model, unregister_model
from vllm.config import VllmConfig

from dynamo_lmcache.vllm.args import WorkerConfig
from dynamo_lmcache.vllm.transfer import Role

logger = logging.getLogger(__name__)

_WORKER_TYPES = {
    Role.AGGREGATED: WorkerType.Aggregated,
    Role.PREFILL: WorkerType.Prefill,
    Role.DECODE: WorkerType.Decode,
}
# Which other workers a role needs before its model can be listed.
_NEEDS: dict[Role, list[list[WorkerType]]] = {
    Role.AGGREGATED: [],
    Role.PREFILL: [[WorkerType.Decode]],
    Role.DECODE: [[WorkerType.Prefill]],
}
# Keys that Dynamo's frontend looks for in a card's engine-specific data.
_TOKEN_BUDGET = "token_budget"
_TAG_EXCLUDES_REASONING = "tool_call_structural_tag_excludes_reasoning"
_THINKING_MODE = "default_thinking_mode"
_STREAM_INTERVAL = "stream_interval"


class Registrar:
    """Puts a worker's model, and adapters of it, into discovery."""

    def __init__(self, config: WorkerConfig, vllm_config: VllmConfig, endpoint: Any, ranks: range) -> None:
        self._config = config
        self._vllm = vllm_config
        self._endpoint = endpoint
        self._ranks = ranks

    @property
    def worker_type(self) -> WorkerType:
        """Dynamo's name for the worker's role."""
        return _WORKER_TYPES[self._config.role]

    async def publish_model(self) -> None:
        """List the model. It is served as soon as this returns."""
        config = self._config
        await register_model(
            ModelInput.Tokens,
            self._model_type(),
            self._endpoint,
            self._model_path(),
            config.served_name,
            custom_template_path=config.runtime.custom_jinja_template,
            model_aliases=list(config.aliases) or None,
            router_config=config.router_config,
            max_gpu_lora_count=config.engine_args.max_loras if config.engine_args.enable_lora else None,
            **self._common(),
        )

    async def publish_adapter(self, name: str, adapter_id: int) -> None:
        """List a LoRA adapter as a model of its own."""
        path = self._model_path()
        await register_model(
            ModelInput.Tokens,
            self._model_type(),
            self._endpoint,
            path,
            user_data={"lora_adapter": True, "lora_id": adapter_id},
            lora_name=name,
            base_model_path=path,
            ignore_weights=True,
            max_gpu_lora_count=self._config.engine_args.max_loras,
            **self._common(),
        )

    async def withdraw_adapter(self, name: str) -> None:
        """Take an adapter out of discovery."""
        await unregister_model(endpoint=self._endpoint, lora_name=name)

    def _common(self) -> dict[str, Any]:
        role = self._config.role
        return {
            "kv_cache_block_size": self._vllm.cache_config.block_size,
            "runtime_config": self._runtime_config(),
            "worker_type": _WORKER_TYPES[role],
            "needs": _NEEDS[role],
        }

    def _model_type(self) -> ModelType:
        if self._config.role is Role.PREFILL:
            return ModelType.Prefill
        return parse_endpoint_types(self._config.runtime.endpoint_types)

    def _model_path(self) -> str:
        # vLLM replaces object-storage URIs by a local copy of the metadata and keeps the URI here.
        model = self._vllm.model_config
        return model.model if getattr(model, "model_weights", "") else self._config.model

    def _runtime_config(self) -> ModelRuntimeConfig:
        runtime, vllm = self._config.runtime, self._vllm
        card = ModelRuntimeConfig()
        card.context_length = vllm.model_config.max_model_len
        card.total_kv_blocks = (vllm.cache_config.num_gpu_blocks or 0) // len(self._ranks)
        card.max_num_seqs = vllm.scheduler_config.max_num_seqs
        card.max_num_batched_tokens = vllm.scheduler_config.max_num_batched_tokens
        card.data_parallel_start_rank = self._ranks.start
        card.data_parallel_size = len(self._ranks)
        card.enable_local_indexer = True
        events = vllm.kv_events_config
        card.kv_event_publishing_enabled = events is not None and events.enable_kv_cache_events
        card.kv_state_endpoint = runtime.kv_state_endpoint
        if self._config.role is not Role.PREFILL:
            card.tool_call_parser = runtime.dyn_tool_call_parser
            card.reasoning_parser = runtime.dyn_reasoning_parser
        card.exclude_tools_when_tool_choice_none = runtime.exclude_tools_when_tool_choice_none
        if hasattr(card, "set_structural_tag"):  # Dynamo 1.4 spells it otherwise
            card.set_structural_tag(runtime.structural_tag)
        for key, value in self._engine_data().items():
            card.set_engine_specific(key, json.dumps(value))
        return card

    def _engine_data(self) -> dict[str, Any]:
        outputs = self._vllm.structured_outputs_config
        data: dict[str, Any] = {
            # The frontend answers 400 itself to what can't fit, before a worker sees it.
            _TOKEN_BUDGET: {
                "combined_limit": self._vllm.model_config.max_model_len,
                "reject_prompt_overflow": True,
                "reject_total_overflow": True,
            },
            _TAG_EXCLUDES_REASONING: bool(outputs.reasoning_parser) and not outputs.enable_in_reasoning,
            _STREAM_INTERVAL: self._config.engine_args.stream_interval,
        }
        if self._config.runtime.dyn_default_thinking_mode is not None:
            data[_THINKING_MODE] = self._config.runtime.dyn_default_thinking_mode
        return data


def dp_ranks(vllm_config: VllmConfig) -> range:
    """Return the global data-parallel ranks that one worker serves."""
    parallel = vllm_config.parallel_config
    first = parallel.data_parallel_rank
    if parallel.data_parallel_external_lb:
        return range(first, first + 1)
    if parallel.data_parallel_hybrid_lb:
        return range(first, first + parallel.data_parallel_size_local)
    return range(first, first + parallel.data_parallel_size)
