"""What the settings of a hand-over say together: docs/pd.md."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache_ext.config.settings import EngineConfig
from lmcache_ext.errors import ConfigError

_ROLES = {"sender": ("kv_producer", "kv_both"), "receiver": ("kv_consumer", "kv_both")}


@dataclass(frozen=True)
class Listen:
    """Where one rank's receiver listens."""

    rank: int
    host: str
    init_port: int
    alloc_port: int


@dataclass(frozen=True)
class Handover:
    """One engine's part in hand-overs. `listens` is empty for a sender, `proxy` None for a receiver."""

    listens: tuple[Listen, ...]
    proxy: str | None  # host:port
    wait_s: float  # for the receiver's slots
    backends: tuple[str, ...]

    @property
    def receives(self) -> bool:
        """Whether this engine decodes."""
        return bool(self.listens)


def handover(config: EngineConfig, kv_role: str, writers: list[int], ranks: int) -> Handover | None:
    """This engine's part, None without `enable_pd`.

    Args:
        config: the engine's settings.
        kv_role: vLLM's, of the connector.
        writers: the ranks that have a pool: each of them hands over.
        ranks: of the engine.

    Raises:
        ConfigError: something is missing, or contradicts something else.
    """
    if not config.enable_pd:
        return None
    if config.pd_role is None:
        raise ConfigError("pd_role", None, "enable_pd needs it: sender on prefill engines, receiver on decode engines")
    if kv_role not in _ROLES[config.pd_role]:
        fits = " or ".join(_ROLES[config.pd_role])
        raise ConfigError("pd_role", config.pd_role, f'with "kv_role": "{kv_role}"; this role needs {fits}')
    if config.pd_role == "sender":
        return Handover((), _proxy(config), config.pd_allocation_timeout_sec, config.nixl_backends)
    if not config.pd_peer_host:
        raise ConfigError("pd_peer_host", config.pd_peer_host, "a receiver needs the address that it listens on")
    init = _of_ranks("pd_peer_init_port", config.pd_peer_init_port, writers, ranks)
    alloc = _of_ranks("pd_peer_alloc_port", config.pd_peer_alloc_port, writers, ranks)
    if len({*init, *alloc}) < 2 * len(writers):
        raise ConfigError("pd_peer_alloc_port", list(alloc), f"all ports must differ, and pd_peer_init_port is {init}")
    listens = tuple(
        Listen(rank, config.pd_peer_host, *ports) for rank, ports in enumerate(zip(init, alloc, strict=True))
    )
    return Handover(listens, None, config.pd_allocation_timeout_sec, config.nixl_backends)


def pool_gb(config: EngineConfig) -> float | None:
    """GB of host memory for each rank, as far as settings say; None: nothing was said."""
    if not config.enable_pd or config.pd_buffer_size is None:
        return config.max_local_cpu_size
    cache = config.max_local_cpu_size if config.local_cpu else None
    return config.pd_buffer_size / (1 << 30) + (cache or 0.0)


def no_gpu_buffer(config: EngineConfig, ranks: int, own_process: bool) -> str:
    """Why a hand-over's slots are in host memory although `pd_buffer_device` is cuda; "": they are not, or it is cpu.

    Args:
        ranks: of the engine.
        own_process: whether its worker has a process of its own, apart from its scheduler's.
    """
    if config.pd_buffer_device != "cuda" or not config.enable_pd:
        return ""
    tiers = [name for name in ("local_disk", "gds_path", "remote_url") if getattr(config, name)]
    if config.pd_buffer_size is None:
        return "pd_buffer_size is unset"
    if ranks > 1 or own_process:
        return "the workers have processes of their own, and the agents are the scheduler's"
    if config.local_cpu:
        return "local_cpu keeps chunks in host memory"
    if tiers:
        return f"{' and '.join(tiers)} take chunks from host memory"
    return ""


def _proxy(config: EngineConfig) -> str | None:
    if config.pd_skip_proxy_notification:
        return None
    for name in ("pd_proxy_host", "pd_proxy_port"):
        if getattr(config, name) is None:
            raise ConfigError(name, None, "a sender needs the proxy's, or pd_skip_proxy_notification")
    return f"{config.pd_proxy_host}:{config.pd_proxy_port}"


def _of_ranks(name: str, ports: tuple[int, ...], writers: list[int], ranks: int) -> list[int]:
    """The writers' ports of those that were given: one for each of them, or for each rank."""
    if len(ports) == len(writers):
        return list(ports)
    if len(ports) == ranks:
        return [ports[rank] for rank in writers]
    raise ConfigError(name, list(ports), f"a receiver needs a port for each of its ranks; it has {ranks}")
