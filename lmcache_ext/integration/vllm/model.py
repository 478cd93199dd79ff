"""What we need to know of vLLM's configuration: geometry, namespace, and whether we can cache this model at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blake3 import blake3
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MLAAttentionSpec

from lmcache_ext.config import EngineConfig
from lmcache_ext.errors import ConfigError
from lmcache_ext.keys import Namespace
from lmcache_ext.transfer.rendezvous import Berth

# 0.26 and 0.27 keep one tensor per layer, 0.29 and later one for all; the bytes of a page are the same. Raise it when
# the meaning of a page's bytes changes in a version that we support.
KV_FORMAT = "packed-kv-1"


@dataclass(frozen=True)
class Model:
    """Geometry of the engine that we serve. Sizes are per rank."""

    block_size: int  # tokens
    num_blocks: int
    world_size: int
    tp_size: int
    replicated: bool  # every TP rank of a PP stage holds the same bytes (MLA): one of them stores for all

    @classmethod
    def of(cls, config: VllmConfig, kv: KVCacheConfig) -> Model:
        """Read it off vLLM's configuration; call `unsupported` first."""
        parallel = config.parallel_config
        specs = specs_of(kv)
        return cls(
            block_size=int(kv.kv_cache_groups[0].kv_cache_spec.block_size),
            num_blocks=int(kv.num_blocks),
            world_size=int(parallel.world_size),
            tp_size=int(parallel.tensor_parallel_size),
            replicated=(
                parallel.tensor_parallel_size > 1
                and getattr(parallel, "nnodes", 1) == 1
                and all(isinstance(spec, MLAAttentionSpec) for spec in specs)
            ),
        )

    def writer(self, rank: int) -> int:
        """The rank whose pool `rank` reads from: its own, or the first of its PP stage."""
        return rank // self.tp_size * self.tp_size if self.replicated else rank

    @property
    def writers(self) -> list[int]:
        """All ranks that have a pool."""
        return [rank for rank in range(self.world_size) if self.writer(rank) == rank]

    @property
    def members(self) -> int:
        """How many ranks map each pool."""
        return self.tp_size if self.replicated else 1

    def blocks_per_chunk(self, config: EngineConfig) -> int:
        """Raises ConfigError unless a chunk is a whole number of blocks."""
        if config.chunk_size % self.block_size:
            fits = max(1, config.chunk_size // self.block_size) * self.block_size
            raise ConfigError(
                "LMCACHE_CHUNK_SIZE",
                config.chunk_size,
                f"must be a multiple of the engine's block size of {self.block_size} tokens; {fits} would do",
            )
        return config.chunk_size // self.block_size


@dataclass(frozen=True)
class Division:
    """What engines of one model have in common whatever their TP size.

    Args:
        pages: [layers, outer, heads, head_bytes] of the whole model, as `pd.wire.Geometry` has them.
        kind: what else must be equal.
    """

    pages: tuple[tuple[int, int, int, int], ...]
    kind: str


def unsupported(config: VllmConfig, kv: KVCacheConfig) -> str:
    """Why this model is served without caching; "" if it is cached."""
    parallel = config.parallel_config
    if len(kv.kv_cache_groups) != 1:
        return f"its layers form {len(kv.kv_cache_groups)} KV cache groups (a hybrid model)"
    for spec in specs_of(kv):
        if not isinstance(spec, FullAttentionSpec):
            return f"it has {type(spec).__name__} layers"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            return f"{name} is {getattr(parallel, name)}"
    if getattr(config.model_config, "is_diffusion", False):
        return "it is a diffusion model"
    return ""


def specs_of(kv: KVCacheConfig) -> list[Any]:
    """Of the layers, as far as they differ."""
    spec = kv.kv_cache_groups[0].kv_cache_spec if kv.kv_cache_groups else None
    inner = getattr(spec, "kv_cache_specs", None)
    return list(inner.values()) if inner is not None else [spec]


def namespace(
    config: VllmConfig, model: Model, engine: EngineConfig, pools: Sequence[Berth], epoch: int,
    division: Division | None = None,
) -> Namespace:  # fmt: skip
    """What this engine's chunks mean.

    Args:
        pools: in the order of the ranks.
        division: how a hand-over divides them; then they mean the same on engines of other TP sizes.
    """
    mc, parallel = config.model_config, config.parallel_config
    attention = getattr(config, "attention_config", None)
    return Namespace(
        model=str(mc.model),
        revision=str(getattr(mc, "revision", None)),
        weights=_weights(config),
        dtype=str(mc.dtype),
        kv_dtype=str(config.cache_config.cache_dtype),
        layout=division.kind if division else "|".join(pool.layout for pool in pools),
        backend=f"{_platform()}:{getattr(attention, 'backend', None)}",
        page_geometry=str(division.pages) if division else "|".join(str(pool.row_bytes) for pool in pools),
        block_size=model.block_size,
        chunk_size=engine.chunk_size,
        parallel="any" if division else _parallel(parallel, model),
        kv_format=KV_FORMAT,
        epoch=epoch,
    )


class Names:
    """What chunks are called in tiers. Keys that do not say what shape the engine has get its `shape`, 32 bytes; others
    (None) stay as they are. It is its own inverse.
    """

    def __init__(self, shape: bytes | None) -> None:
        self._mask = int.from_bytes(shape or b"", "big")

    def __call__(self, key: bytes) -> bytes:
        return (int.from_bytes(key, "big") ^ self._mask).to_bytes(len(key), "big") if self._mask else key

    def renew(self) -> None:
        """From now on nothing in a tier goes by the name that it has."""
        self._mask ^= int.from_bytes(os.urandom(32), "big")


def _parallel(parallel: Any, model: Model) -> str:
    return f"tp{parallel.tensor_parallel_size}pp{parallel.pipeline_parallel_size}rep{int(model.replicated)}"


def _weights(config: VllmConfig) -> str:
    mc = config.model_config
    hf = mc.hf_config.to_dict() if hasattr(mc.hf_config, "to_dict") else {}
    spec = getattr(config, "speculative_config", None)
    facts = {"hf": hf, "quantization": str(mc.quantization), "draft": str(getattr(spec, "model", None))}
    return blake3(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _platform() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def kv_dtype(vllm_config: VllmConfig) -> str:
    """What KV is made of where that is the model's own type; "" where it is a smaller one."""
    stored = str(vllm_config.cache_config.cache_dtype)
    return str(vllm_config.model_config.dtype) if stored == "auto" else stored if "16" in stored else ""
