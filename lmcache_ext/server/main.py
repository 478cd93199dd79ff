"""The server's process: memory, tiers, the loop, HTTP, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import time

import msgspec

from lmcache_ext.engine import Level
from lmcache_ext.errors import ConfigError
from lmcache_ext.server.config import ServerConfig
from lmcache_ext.server.figures import status
from lmcache_ext.server.loop import Loop
from lmcache_ext.server.memory import Segment
from lmcache_ext.server.service import Service
from lmcache_ext.server.state import Setup
from lmcache_ext.server.web import Http

logger = logging.getLogger("lmcache_ext.server")

_WATCH_SECONDS = 0.5  # between two looks whether the loop still runs
_CLOSE_SECONDS = 10.0


def serve(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises ConfigError if it can't start."""
    with contextlib.suppress(ValueError, OSError):  # each process of a client is watched through a descriptor
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    memory = segment(config)
    levels: list[Level] = []
    try:
        for adapter in config.adapters:
            levels.append(adapter.open())  # noqa: PERF401 - those opened so far are closed if one fails
        setup = Setup(
            memory.nbytes, config.extent_bytes, config.policy, config.chunk_size, config.silence_seconds,
            levels=levels, names=[adapter.type for adapter in config.adapters],
        )  # fmt: skip
        service = Service(setup, memory)
        service.figures = lambda: msgspec.json.encode(status(service, config.instance_id))
        loop = Loop(service, config.address)
    except ConfigError:
        for level in levels:
            level.tier.close(1.0)
        memory.close()
        raise
    loop.start()
    try:
        return asyncio.run(_until_told(config, loop))
    finally:
        if not loop.stop(_CLOSE_SECONDS):
            logger.error("the server did not end within %.0f s", _CLOSE_SECONDS)


def segment(config: ServerConfig) -> Segment:
    """The memory, all of it if it is not to be taken lazily. Raises ConfigError if there is not so much."""
    began = time.monotonic()
    try:
        made = Segment(config.nbytes, "lmcache-server")
        while not config.l1_use_lazy and made.populate():
            pass
    except OSError as error:
        raise ConfigError("--l1-size-gb", config.l1_size_gb, f"the kernel refuses it: {error.strerror}") from None
    logger.info("%.2f GB of memory, %s in %.1f s", made.nbytes / (1 << 30),
                "reserved" if config.l1_use_lazy else "populated", time.monotonic() - began)  # fmt: skip
    return made


async def _until_told(config: ServerConfig, loop: Loop) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    http = Http(config, loop)
    await http.start()
    logger.info("serving clients at %s, HTTP at %s", loop.address, http.address)
    try:
        while loop.alive and not stop.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stop.wait(), _WATCH_SECONDS)
    finally:
        await http.stop()
    return 0 if loop.failed is None and stop.is_set() else 1
