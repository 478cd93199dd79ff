"""The engine's settings, frozen and validated once.

Lowest to highest: built-in, YAML through `LMCACHE_CONFIG_FILE`, `LMCACHE_*` variables, and `lmcache.*` in vLLM's
`kv_connector_extra_config`. Upstream's aliases resolve within each source. Unknown keys warn; bad values are refused
with the name under which they were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lmcache_ext.config.sources import Layer, layers
from lmcache_ext.errors import ConfigError
from lmcache_ext.policies import POLICIES


def _known_policy(name: str) -> str:
    if name not in POLICIES:
        raise ValueError(f"must be one of {', '.join(POLICIES)}")
    return name.upper()


class EngineConfig(BaseSettings):
    """One engine's settings. Names, defaults and units are upstream's; docs/settings.md explains each."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    chunk_size: Annotated[int, Field(gt=0, le=65536)] = 256
    """tokens a chunk; a multiple of the engine's block size"""
    local_cpu: bool = True
    """keep chunks in host memory; False: L1 only stages, and nothing is found in it"""
    max_local_cpu_size: Annotated[float, Field(gt=0)] | None = None
    """GB (2^30 bytes) of host memory per rank; None: see `default_pool_gb`"""
    cache_policy: Annotated[str, AfterValidator(_known_policy)] = "LRU"
    save_decode_cache: bool = False
    """store the KV of generated tokens, too"""
    save_unfull_chunk: bool | None = None
    """store a prompt's last, partial chunk, in whole blocks; None: as `discard_partial_chunks` says"""
    min_retrieve_tokens: Annotated[int, Field(ge=0)] = 0
    """tokens; a shorter hit is not loaded"""
    max_tokens_per_load: Annotated[int, Field(ge=0)] = 0
    """tokens; the most that one request loads; 0: no limit"""
    store_timeout_secs: Annotated[float, Field(gt=0)] = 10.0
    """seconds after which a store gives its GPU blocks back, done or not"""
    load_timeout_secs: Annotated[float, Field(gt=0)] = 30.0
    """seconds after which a load that has not begun is given up and its tokens are computed"""
    max_pinned_fraction: Annotated[float, Field(gt=0, le=1)] = 0.05
    """share of the GPU's blocks that stores under way may hold once their request is gone, also when few are free"""
    enable_blending: Literal[False] = False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load_config` hands over: it resolves names and knows where each value came from."""
        return (init_settings,)

    @property
    def stores_partial(self) -> bool:
        """Whether a prompt's tail of whole blocks is stored when nothing was said about it."""
        return self.save_unfull_chunk is not False


def load_config(
    extra: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> EngineConfig:
    """Merge all sources and validate.

    Args:
        extra: vLLM's `kv_connector_extra_config`; only keys that start with `lmcache.` are settings.
        environ: the environment; None: this process's.
        defaults: values that beat the built-in ones and nothing else.

    Raises:
        ConfigError: a value is bad, or the YAML file can't be read.
    """
    values: dict[str, Any] = dict(defaults or {})
    origin: dict[str, tuple[str, Any]] = {}
    known = set(EngineConfig.model_fields)
    for layer in layers(extra or {}, environ, known):
        _overlay(layer, values, origin)
    if "enable_blending" in values:
        values["enable_blending"] = _no_blending(values["enable_blending"], origin)
    try:
        return EngineConfig(**values)
    except ValidationError as error:
        raise _refusal(error, origin) from None


def _overlay(layer: Layer, values: dict[str, Any], origin: dict[str, tuple[str, Any]]) -> None:
    for name, (typed, value) in layer.items():
        values[name] = value
        origin[name] = (typed, value)


def _no_blending(value: object, origin: Mapping[str, tuple[str, Any]]) -> Literal[False]:
    if str(value).strip().lower() in {"0", "false", "no", "off", "f", "n", "none"}:
        return False
    name = origin["enable_blending"][0] if "enable_blending" in origin else "enable_blending"
    raise ConfigError(name, value, "CacheBlend (reuse that is not a prefix) does not exist here yet; leave it off")


def _refusal(error: ValidationError, origin: Mapping[str, tuple[str, Any]]) -> ConfigError:
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else "?"
    typed, value = origin.get(field, (field, first.get("input")))
    return ConfigError(typed, value, str(first["msg"]))
