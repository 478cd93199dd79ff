"""The engine's settings, frozen and validated once.

Lowest to highest: built-in, YAML through `LMCACHE_CONFIG_FILE`, `LMCACHE_*` variables, and `lmcache.*` in vLLM's
`kv_connector_extra_config`. Upstream's aliases resolve within each source. Unknown keys warn; bad values are refused
with the name under which they were given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lmcache_ext.config.sources import Layer, layers
from lmcache_ext.errors import ConfigError
from lmcache_ext.policies import POLICIES

LOCATIONS = ("LocalCPUBackend", "LocalDiskBackend", "GdsBackend", "RemoteBackend")
"""Upstream's names of host memory, of `local_disk`, of `gds_path` and of `remote_url`."""

STAGES = ("fp8", "aesgcm")
"""What `remote_serde` can be made of, in their order."""


def _known_policy(name: str) -> str:
    if name not in POLICIES:
        raise ValueError(f"must be one of {', '.join(POLICIES)}")
    return name.upper()


def _words(given: object) -> object:
    """A list, or names with commas between."""
    names = [word.strip() for word in given.split(",") if word.strip()] if isinstance(given, str) else given or ()
    for name in names if isinstance(names, (list, tuple)) else ():
        if name not in LOCATIONS:
            raise ValueError(f"must be among {', '.join(LOCATIONS)}")
    return names


def _ports(given: object) -> object:
    """One port, a list of them, or ports with commas between: one for each rank."""
    ports = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    return [port for port in ports if str(port).strip()] if isinstance(ports, (list, tuple)) else ports


def _listed(given: object) -> object:
    """A list, or names with commas between."""
    return [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given


def _known_stages(given: str) -> str:
    names = [name.strip() for name in given.split(",") if name.strip() not in ("", "naive")]
    if names != [stage for stage in STAGES if stage in names]:
        raise ValueError(f"must be naive, or some of {','.join(STAGES)} in this order")
    return ",".join(names) or "naive"


Port = Annotated[int, Field(ge=1, le=65535)]
Ports = Annotated[tuple[Port, ...], BeforeValidator(_ports)]


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
    """store a prompt's last, partial chunk: whole blocks, or with `enable_pd` all; None: as `discard_partial_chunks`"""
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
    local_disk: str | None = None
    """folders for chunks, `file:///a/,/b/`, or the URL of another tier on this machine; docs/tiers.md"""
    max_local_disk_size: Annotated[float, Field(ge=0)] = 0.0
    """GB (2^30 bytes) that `local_disk` takes"""
    gds_path: str | None = None
    """folders for chunks, `/a/,/b/`, that NIXL's GDS_MT plugin reads and writes"""
    max_gds_size: Annotated[float, Field(ge=0)] = 0.0
    """GB (2^30 bytes) that `gds_path` takes"""
    remote_url: str | None = None
    """a tier that engines share, by URL; docs/tiers.md"""
    remote_serde: Annotated[str, AfterValidator(_known_stages)] = "naive"
    """what is done to chunks on their way to `remote_url`: naive, nothing; fp8, half the bytes, lossy; aesgcm,
    encrypted; fp8,aesgcm"""
    remote_serde_key_file: str | None = None
    """for aesgcm: a file with 64 hexadecimal digits"""
    store_location: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    """the tiers that are written, by upstream's names; (): all"""
    retrieve_locations: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    """the tiers that are read"""
    lookup_timeout_ms: Annotated[float, Field(gt=0)] = 50.0
    """milliseconds after which a tier that did not say what it has counts as having nothing"""
    min_uses_before_write_back: Annotated[int, Field(ge=0)] = 0
    """how often a chunk was loaded from host memory before tiers get it"""
    skip_slow_tiers: bool = True
    """compute what a tier is likely to bring more slowly"""
    enable_tracing: bool | None = None
    """spans by OpenTelemetry; None: where vLLM traces, too"""
    enable_pd: bool = False
    """hand KV over from prefill to decode engines of plain `vllm serve`; docs/pd.md"""
    pd_role: Literal["sender", "receiver"] | None = None
    """sender: this engine prefills; receiver: it decodes"""
    pd_peer_host: str | None = None
    """receiver: the address of this host that it listens on"""
    pd_peer_init_port: Ports = ()
    """receiver: a port for each rank, on which senders ask for sessions"""
    pd_peer_alloc_port: Ports = ()
    """receiver: a port for each rank, on which senders ask for slots"""
    pd_proxy_host: str | None = None
    """sender: where the proxy takes notifications"""
    pd_proxy_port: Port | None = None
    """sender: its port"""
    pd_skip_proxy_notification: bool = False
    """sender: there is no proxy to be told"""
    pd_buffer_size: Annotated[int, Field(gt=0)] | None = None
    """bytes per rank for the hand-over, on top of `max_local_cpu_size` where `local_cpu` is on"""
    pd_buffer_device: Literal["cpu", "cuda"] = "cpu"
    """whose memory hands over and takes: the host's, or the GPU's, where the engine has one rank and nothing below"""
    pd_allocation_timeout_sec: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """seconds that a hand-over waits for the receiver's slots"""
    transfer_channel: Literal["nixl"] = "nixl"
    """what moves the bytes"""
    nixl_backends: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = ("UCX",)
    """NIXL's names of what moves them"""
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
        """Whether a prompt's tail is stored when nothing was said about it."""
        return self.save_unfull_chunk is not False

    def tail_step(self, block_size: int) -> int:
        """In what a prompt's tail is counted, in tokens: in whole blocks, or where prefill and decode are apart one by
        one, so that the decode engine has nothing but the last token to compute."""
        return 1 if self.enable_pd else block_size


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
    if str(values.get("max_local_cpu_size")) in {"0", "0.0"} and _on(values.get("enable_pd", False)):
        del values["max_local_cpu_size"]  # as upstream's examples say it: `pd_buffer_size` is all there is
    try:
        return EngineConfig(**values)
    except ValidationError as error:
        raise _refusal(error, origin) from None


def _overlay(layer: Layer, values: dict[str, Any], origin: dict[str, tuple[str, Any]]) -> None:
    for name, (typed, value) in layer.items():
        if value is not None:  # NULL in YAML: what a lower source says
            values[name] = value
            origin[name] = (typed, value)


def _on(value: object) -> bool:
    return str(value).strip().lower() not in {"0", "false", "no", "off", "f", "n", "none"}


def _no_blending(value: object, origin: Mapping[str, tuple[str, Any]]) -> Literal[False]:
    if not _on(value):
        return False
    name = origin["enable_blending"][0] if "enable_blending" in origin else "enable_blending"
    raise ConfigError(name, value, "CacheBlend (reuse that is not a prefix) does not exist here yet; leave it off")


def _refusal(error: ValidationError, origin: Mapping[str, tuple[str, Any]]) -> ConfigError:
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else "?"
    typed, value = origin.get(field, (field, first.get("input")))
    return ConfigError(typed, value, str(first["msg"]))
