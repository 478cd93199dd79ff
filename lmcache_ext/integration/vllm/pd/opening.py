"""Makes the part that an engine takes in hand-overs, as its settings say."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import zmq

from lmcache_ext.config import EngineConfig, Handover
from lmcache_ext.errors import ConfigError
from lmcache_ext.integration.vllm.log import get_logger
from lmcache_ext.integration.vllm.model import Division, Model
from lmcache_ext.integration.vllm.pd.base import Apart
from lmcache_ext.integration.vllm.pd.decode import Decode
from lmcache_ext.integration.vllm.pd.prefill import Prefill
from lmcache_ext.integration.vllm.pd.slots import paced, slots_of
from lmcache_ext.pd import Geometry, Receiver, ReceiverOptions, Sender, SenderOptions, Store
from lmcache_ext.transfer import HostPool
from lmcache_ext.transfer.lanes import use_all_cores
from lmcache_ext.transfer.rendezvous import Berth

logger = get_logger("pd")

_START_SECONDS = 60.0  # for NIXL to start and to register the memory
T = TypeVar("T")


def open_handover(
    part: Handover | None, config: EngineConfig, model: Model, berths: Sequence[Berth], pools: Sequence[HostPool],
    division: Division | None,
) -> Apart:  # fmt: skip
    """What the scheduler side has to do for hand-overs; nothing without `part`.

    Args:
        part: what the settings say.
        berths: of every rank that has a pool, in their order; none: nothing is cached.
        pools: the same as far as they are in host memory: all, or none.
        division: how chunks are divided among them, if that is known.
    """
    if part is None:
        return Apart()
    if not berths:
        logger.error("no pool: nothing is handed over")
        return Apart()
    sides = [slots_of(berth, pools[i] if pools else None) for i, berth in enumerate(berths)]

    def geometry(i: int, root: str) -> Geometry:
        # The root says model, types, sizes and versions.
        where = "" if berths[i].gpu is None else ", in GPU memory"
        layout = f"{division.kind if division else berths[i].layout}{where}, keys of {root}"
        pages = division.pages if division else ()
        return Geometry.of(berths[i].shape, config.chunk_size, layout, rank=i, ranks=len(berths), pages=pages)

    if not part.receives:

        def sender(i: int, root: str) -> Sender:
            options = SenderOptions(proxy=part.proxy, alloc_wait_s=part.wait_s, backends=part.backends)
            return _on_all_cores(lambda: Sender(*sides[i], geometry(i, root), paced(options, berths[i])))

        return Prefill(config, model.block_size, model.writers, model.world_size, sender)

    host = _address(part.listens[0].host)
    if ipaddress.ip_address(host).is_loopback:
        os.environ.setdefault("UCX_NET_DEVICES", "lo")  # UCX listens at all devices otherwise

    def receiver(i: int, root: str, store: Store) -> Receiver:
        listen = part.listens[i]
        options = ReceiverOptions(
            host, listen.init_port, listen.alloc_port, alloc_wait_s=part.wait_s, backends=part.backends
        )
        try:
            return _on_all_cores(lambda: Receiver(*sides[i], geometry(i, root), store, options))
        except zmq.ZMQError as error:
            ports = f"{listen.host}:{listen.init_port} and {listen.alloc_port}"
            raise ConfigError("pd_peer_init_port", listen.init_port, f"can't listen at {ports}: {error}") from None

    return Decode(config, model.block_size, len(berths), receiver)


def _address(host: str) -> str:
    """Of a name or address; ZMQ binds to no names."""
    try:
        return str(socket.getaddrinfo(host, None, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError("pd_peer_host", host, f"is no address: {error.strerror}") from None


def _on_all_cores(make: Callable[[], T]) -> T:
    """`make()` in a thread that may run anywhere, and so do all that it starts: the engine binds its main thread."""
    with ThreadPoolExecutor(1, initializer=use_all_cores) as pool:
        return pool.submit(make).result(timeout=_START_SECONDS)
